"""Data sets of the Hugging Face hub, streamed through ``datasets``, one shard per file.

No shuffle buffer is used: a buffer forgets its content on resume (50 documents lost at a buffer of 100, measured).
The order comes from :mod:`bitnet.data.shuffle`, which needs only shards that can be read again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bitnet.data.sources import OnBadLine, Shard
from bitnet.errors import InputError

if TYPE_CHECKING:
    from datasets import IterableDataset

HUB_TIMEOUT = 5.0  # seconds; without a probe of our own an unreachable hub takes 28 to fail


@dataclass(frozen=True)
class HubDataset:
    """A configuration of a hub data set, e.g. ``HubDataset("allenai/c4", "en")``."""

    repository: str
    config: str
    revision: str = "main"

    def commit(self) -> str:
        """The commit that ``revision`` stands for now.

        Raises:
            InputError: The hub does not answer within five seconds, or offline mode is on.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            info = HfApi().dataset_info(self.repository, revision=self.revision, timeout=HUB_TIMEOUT)
        except OfflineModeIsEnabled as error:
            raise InputError(
                f"{self.repository} is on the Hugging Face hub and HF_HUB_OFFLINE is set: unset it, or set data.path "
                "to a local copy"
            ) from error
        except Exception as error:  # which library speaks to the hub, and so what it raises, changes with its version
            raise InputError(
                f"the Hugging Face hub does not answer for {self.repository} ({type(error).__name__}): check the "
                "network, or set data.path to a local copy (HF_HUB_OFFLINE=1 makes this fail at once)"
            ) from error
        return str(info.sha)

    def stream(self, split: str) -> "IterableDataset":
        """The split as a stream of rows.

        Raises:
            InputError: The hub cannot be reached.
        """
        return open_stream(self.repository, name=self.config, split=split, revision=self.commit())


def open_stream(repository: str, **options: Any) -> "IterableDataset":
    """``datasets.load_dataset(repository, streaming=True, **options)``; it may read the first file to learn its
    columns.

    Raises:
        InputError: That file cannot be read.
    """
    from datasets import load_dataset

    with _clear_errors(repository):
        return load_dataset(repository, streaming=True, **options)


def stream_shards(
    stream: "IterableDataset", name: str, read: Callable[[Iterator[Any], str], Iterator[str]]
) -> list[Shard]:
    """One shard per file of a ``datasets`` stream; ``read(values of "text", shard's name)`` yields the documents."""
    count = stream.num_shards
    parts = [(f"{name}[{index}]", stream.shard(num_shards=count, index=index)) for index in range(count)]
    return [Shard(part, partial(_read_part, texts, part, read)) for part, texts in parts]


def _read_part(
    stream: "IterableDataset", name: str, read: Callable[[Iterator[Any], str], Iterator[str]]
) -> Iterator[str]:
    return read(text_column(stream, name), name)


def text_column(stream: "IterableDataset", name: str) -> Iterator[Any]:
    """The values of ``text``, one per row, None where there is none.

    Rows are taken by ``iter``: plain iteration inside a data worker lets ``datasets`` share the files out among workers
    a second time, and every worker but one would find its own shard empty.

    Raises:
        InputError: ``datasets`` cannot read on.
    """
    with _clear_errors(name):
        for batch in stream.iter(batch_size=64):
            rows = len(next(iter(batch.values())))
            yield from batch.get("text", [None] * rows)


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Errors of ``datasets``, which name neither the file nor a way out, as one that does."""
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    try:
        yield
    except (ArrowInvalid, DatasetGenerationError, EOFError, OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{name}: `datasets` cannot read on ({type(error).__name__}: {error}): download the files and set "
            "data.path; the local reader names the line and can skip it"
        ) from error


def text_documents(
    texts: Iterator[Any], name: str, *, skipped: dict[str, int], on_bad_line: OnBadLine = "error"
) -> Iterator[str]:
    """The documents of a column of texts, without those that hold only white space.

    Raises:
        InputError: A row without a string in ``text`` (``error`` only), or no document at all.
    """
    bad, found = 0, False
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            if on_bad_line == "error":
                raise InputError(
                    f'{name}:{number}: expected a string in "text", got {text!r}: set data.source.on_bad_line=skip to '
                    "leave such rows out and count them"
                )
            bad += 1
            skipped[name] = max(bad, skipped.get(name, 0))
        elif text.strip():
            found = True
            yield text
    if not found:
        raise InputError(f"{name} holds no documents")
