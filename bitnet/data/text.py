"""The user's own text: a file, a folder or a glob of ``.txt``, ``.jsonl`` and ``.parquet`` files."""

import glob
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from bitnet.data.files import InvalidUtf8, parquet_rows, read_lines, stat_fingerprint
from bitnet.data.jsonlines import read_json_lines
from bitnet.data.sources import OnBadLine, Shard, Split, check_choice, in_split
from bitnet.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
Documents = Literal["paragraph", "file"]


class Text:
    """Source of one's own files; documents go to train, validation and test by the hash of their text.

    Args:
        path: A file, a folder (searched through all its levels) or a glob such as ``books/*.txt``.
        documents: What a document of a ``.txt`` file is: a ``paragraph`` (blank lines separate them) or the whole
            ``file``. A line of a ``.jsonl`` file and a row of a ``.parquet`` file are always one document.
        field: Key or column that holds the text in ``.jsonl`` and ``.parquet`` files.
        on_bad_line: For ``.jsonl``: ``error``, or ``skip`` and count.
        invalid_utf8: For ``.txt``: ``error``, or ``replace`` and count.

    Raises:
        InputError: ``path`` is unset or matches no file of a kind that can be read.
    """

    name = "text"
    streaming = False

    def __init__(
        self,
        path: str | Path | None,
        documents: Documents = "paragraph",
        field: str = "text",
        on_bad_line: OnBadLine = "error",
        invalid_utf8: InvalidUtf8 = "error",
    ) -> None:
        check_choice("data.source.documents", documents, ("paragraph", "file"))
        check_choice("data.source.on_bad_line", on_bad_line, ("error", "skip"))
        check_choice("data.source.invalid_utf8", invalid_utf8, ("error", "replace"))
        self.documents, self.field = documents, field
        self.on_bad_line: OnBadLine = on_bad_line
        self.invalid_utf8: InvalidUtf8 = invalid_utf8
        self.files = _find(path)
        self.skipped: dict[str, int] = {}

    def shards(self, split: Split) -> list[Shard]:
        return [Shard(str(path), partial(self._read, path, split)) for path in self.files]

    def fingerprint(self) -> str:
        options = f"{self.documents} {self.field} {self.on_bad_line} {self.invalid_utf8}"
        return hashlib.sha256(f"{options} {stat_fingerprint(self.files)}".encode()).hexdigest()

    def _read(self, path: Path, split: Split) -> Iterator[str]:
        if path.suffix == ".parquet":
            documents = parquet_rows(path, self.field)
        elif path.suffix == ".txt":
            documents = self._paragraphs(path)
        else:
            documents = read_json_lines(path, self.skipped, field=self.field, on_bad_line=self.on_bad_line)
        return in_split(documents, split)

    def _paragraphs(self, path: Path) -> Iterator[str]:
        lines: list[str] = []
        replaced = 0
        for line, damaged in read_lines(path, self.invalid_utf8):
            if damaged:
                replaced += 1
                self.skipped[str(path)] = max(replaced, self.skipped.get(str(path), 0))
            if line.strip() or self.documents == "file":
                lines.append(line)
            elif lines:
                yield "".join(lines).rstrip("\r\n")
                lines = []
        if lines:
            yield "".join(lines).rstrip("\r\n")


def _find(path: str | Path | None) -> list[Path]:
    if path is None:
        raise InputError("data=text reads your own files: set data.path to a file, a folder or a glob of them")
    given = Path(path)
    if given.is_dir():
        found = [file for file in given.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES)]
    elif given.is_file():
        found = [given]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    if not found:
        raise InputError(
            f"data.path must name files of text ({', '.join(SUFFIXES)}), got {path}: nothing there matches"
        )
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise InputError(
                f"{file} cannot be read as text: expected one of {', '.join(SUFFIXES)}; rename or convert it"
            )
    return sorted(found)
