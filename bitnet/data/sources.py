"""What a source of text is: named shards of documents for each of three splits.

A document is a ``str``. A source lists the shards of a split in an order that never changes, and a shard can be read
from its start as often as one likes. Everything after it (shuffling, resuming, sharding by rank, tokenizing) needs no
more than that, so a new data set is one function that yields strings.

Sources without splits of their own share documents out by the hash of their text. The same text always lands in the
same split, whatever its position or the files beside it: exact duplicates cannot leak from training into evaluation.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from bitnet.errors import InputError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
OnBadLine = Literal["error", "skip"]

TRAIN_SHARE = 0.90
VALIDATION_SHARE = 0.05


@dataclass(frozen=True)
class Shard:
    """A named, re-readable sequence of documents; ``read`` is picklable, so that a data worker can take it along."""

    name: str
    read: Callable[[], Iterator[str]]


class Source(Protocol):
    """A data set: see the module's docstring.

    Attributes:
        name: What the run's record calls it.
        streaming: True: too large for a token cache, training reads it as it goes. False: tokenized once.
        skipped: Bad lines left out so far by this process, a count per shard.
    """

    name: str
    streaming: bool
    skipped: dict[str, int]

    def shards(self, split: Split) -> list[Shard]:
        """The shards of a split, always in the same order.

        Raises:
            InputError: There is nothing to read.
        """
        ...

    def fingerprint(self) -> str:
        """Changes when what the source would yield changes; quick, so not a hash of all the text."""
        ...


def documents_of(source: Source, split: Split) -> Iterator[str]:
    """Every document of a split, shard after shard, without end markers or shuffling."""
    for shard in source.shards(split):
        yield from shard.read()


def hash_share(document: str) -> float:
    """The document's place in [0, 1), uniform over texts and the same on every machine (SHA-256 of its UTF-8)."""
    return int.from_bytes(hashlib.sha256(utf8(document)).digest()[:8], "big") / 2**64


def split_of(document: str) -> Split:
    """The split a document of an undivided corpus belongs to: 90 % train, 5 % validation, 5 % test."""
    share = hash_share(document)
    if share < TRAIN_SHARE:
        return "train"
    return "validation" if share < TRAIN_SHARE + VALIDATION_SHARE else "test"


def in_split(documents: Iterable[str], split: Split) -> Iterator[str]:
    """The documents that belong to ``split``, without those that hold nothing but white space."""
    return (document for document in documents if document.strip() and split_of(document) == split)


def utf8(document: str) -> bytes:
    """The document's bytes; a lone surrogate (valid in JSON, not in text) counts as U+FFFD's stand-in ``?``."""
    return document.encode("utf-8", errors="replace")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse an option that is not one of ``choices``.

    Raises:
        InputError: It is not.
    """
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
