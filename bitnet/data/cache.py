"""Tokens of a whole split: written once to files that are mapped into memory, or gathered in memory up to a limit.

    <key>.<split>.ids      uint16 (vocabularies up to 65,536) or uint32, little endian, one number per token
    <key>.<split>.starts   int64, the index of each document's first token
    <key>.<split>.json     counts, the text's hash, and size and SHA-256 of the two files; written last

A pair of files whose size or hash is not what the sidecar says is built again, with a line that says so.
"""

import errno
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet.data.pack import Block
from bitnet.data.sources import utf8
from bitnet.data.tokenize import DocumentEncoder, Ids
from bitnet.errors import InputError
from bitnet.files import atomic_file

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenized text.

    Attributes:
        ids: [tokens], document after document, marks included.
        starts: [documents], the index of each document's first token, ascending.
        n_bytes: UTF-8 bytes of the documents.
        text_hash: SHA-256 over the documents in order.
    """

    ids: NDArray[Any]
    starts: NDArray[np.int64]
    n_bytes: int
    text_hash: str

    def block(self, index: int, block_size: int) -> Block:
        """Tokens ``[index * block_size, (index + 1) * block_size)``, fewer at the end of the text."""
        begin, end = index * block_size, (index + 1) * block_size
        first, last = np.searchsorted(self.starts, [begin, end])
        return Block(self.ids[begin:end], self.starts[first:last] - begin)


def tokens_in_memory(documents: Iterable[str], encoder: DocumentEncoder, limit: int | None) -> Tokens:
    """Tokens of the first documents, as many as it takes to reach ``limit`` tokens (all of them where it is None)."""
    text = _Text()
    parts: list[Ids] = []
    for ids in text.encoded(documents, encoder):
        parts.append(ids)
        if limit is not None and text.n_tokens >= limit:
            break
    ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)
    return Tokens(ids, np.array(text.starts, dtype=np.int64), text.n_bytes, text.digest.hexdigest())


def cached_tokens(
    documents: Callable[[], Iterable[str]], encoder: DocumentEncoder, vocab_size: int, stem: Path
) -> Tokens:
    """The tokens stored under ``stem``, written first where they are missing or damaged.

    Raises:
        InputError: An id is not below ``vocab_size``, or the cache cannot be written.
    """
    problem = _problem(stem)
    if problem is not None:
        if _path(stem, "json").exists():
            print(f"token cache {stem.name} {problem}: building it again", file=sys.stderr, flush=True)
        try:
            _write(documents(), encoder, vocab_size, stem)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            raise InputError(
                f"cannot write the token cache {stem} ({error.strerror}): free space, or set cache_dir to another disk"
            ) from error
    return _open(stem, vocab_size)


class _Text:
    """Counts and hashes what passes through it on the way to its tokens."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.starts: list[int] = []
        self.n_tokens = 0
        self.n_bytes = 0

    def encoded(self, documents: Iterable[str], encoder: DocumentEncoder) -> Iterator[Ids]:
        for ids, document, _ in encoder.encode_all((document, None) for document in documents):
            text = utf8(document)
            self.digest.update(len(text).to_bytes(8, "little") + text)
            self.starts.append(self.n_tokens)
            self.n_tokens += len(ids)
            self.n_bytes += len(text)
            yield ids


def _path(stem: Path, suffix: str) -> Path:
    return stem.with_name(f"{stem.name}.{suffix}")


def _write(documents: Iterable[str], encoder: DocumentEncoder, vocab_size: int, stem: Path) -> None:
    text, dtype = _Text(), np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    with atomic_file(_path(stem, "ids")) as partial, partial.open("wb") as file:
        for ids in text.encoded(documents, encoder):
            file.write(ids.astype(dtype).tobytes())
    with atomic_file(_path(stem, "starts")) as partial:
        partial.write_bytes(np.array(text.starts, dtype="<i8").tobytes())
    sidecar = {
        "format": FORMAT,
        "dtype": dtype.str,
        "tokens": text.n_tokens,
        "bytes": text.n_bytes,
        "text_hash": text.digest.hexdigest(),
        "files": {suffix: _measured(_path(stem, suffix)) for suffix in ("ids", "starts")},
    }
    with atomic_file(_path(stem, "json")) as partial:
        partial.write_text(json.dumps(sidecar, indent=1) + "\n")


def _measured(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _problem(stem: Path) -> str | None:
    """What is wrong with the files under ``stem``; None where nothing is."""
    try:
        files = json.loads(_path(stem, "json").read_text())["files"]
        for suffix in ("ids", "starts"):
            if _measured(_path(stem, suffix)) != files[suffix]:
                return f"is damaged ({_path(stem, suffix).name} is not what was written)"
    except FileNotFoundError as error:
        return f"is incomplete ({error.filename} is missing)"
    except (ValueError, KeyError, TypeError):
        return "is damaged (its json cannot be read)"
    return None


def _open(stem: Path, vocab_size: int) -> Tokens:
    sidecar = json.loads(_path(stem, "json").read_text())
    ids = _mapped(_path(stem, "ids"), np.dtype(sidecar["dtype"]))
    if len(ids) and int(ids.max()) >= vocab_size:
        raise InputError(
            f"{_path(stem, 'ids')} holds the id {int(ids.max())} and the vocabulary has {vocab_size} entries: it "
            "belongs to another tokenizer; delete it"
        )
    return Tokens(ids, _mapped(_path(stem, "starts"), np.dtype("<i8")), sidecar["bytes"], sidecar["text_hash"])


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
