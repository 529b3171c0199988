"""WikiText-103: Wikipedia articles with the splits they were published with, from a local folder or the hub.

``path`` set means the folder only (the hub's parquet files, or the original ``wiki.*.raw``); unset means the hub only.
The stored rows are lines; a document here is an article, from its `` = Title = `` to the next one.
"""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bitnet.data.files import parquet_rows, read_lines, stat_fingerprint
from bitnet.data.hub import HubDataset, text_column
from bitnet.data.sources import Shard, Split
from bitnet.errors import InputError

TITLE = re.compile(r"^ ?= [^=].* = ?$")  # sections have two signs or more: " = = Section = = "


class WikiText:
    """Source of WikiText-103 (raw).

    Args:
        path: Folder with ``*.parquet`` or ``wiki.*`` files, one split each, told from their names; None streams
            ``Salesforce/wikitext`` of the hub.

    Raises:
        InputError: ``path`` is no folder.
    """

    name = "wikitext"
    streaming = False

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and not self.path.is_dir():
            raise InputError(f"data.path must be a folder of WikiText's files, got {path}: there is no such folder")
        self.skipped: dict[str, int] = {}
        self._hub = HubDataset("Salesforce/wikitext", "wikitext-103-raw-v1")

    def shards(self, split: Split) -> list[Shard]:
        name = f"wikitext-{split}"  # one shard: an article may run over the end of a file
        if self.path is None:
            return [Shard(name, partial(_hub_articles, self._hub.stream(split), name))]
        return [Shard(name, partial(_local_articles, self._files(split)))]

    def fingerprint(self) -> str:
        if self.path is None:
            return f"{self._hub.repository}/{self._hub.config}@{self._hub.revision}"
        return stat_fingerprint([*self._files("train"), *self._files("validation"), *self._files("test")])

    def _files(self, split: Split) -> list[Path]:
        assert self.path is not None
        word = "valid" if split == "validation" else split
        found = sorted([*self.path.glob(f"*{word}*.parquet"), *self.path.glob(f"wiki.{word}*")])
        if not found:
            raise InputError(
                f"no file of the {split} split in {self.path}: expected *{word}*.parquet or wiki.{word}.raw; set "
                "data.path to the folder that holds them"
            )
        return found


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Documents out of lines: a new one starts at each top-level title."""
    article: list[str] = []
    for line in lines:
        line = line.rstrip("\n")
        if TITLE.match(line) and article:
            yield from _not_blank(article)
            article = []
        article.append(line)
    yield from _not_blank(article)


def _not_blank(lines: list[str]) -> Iterator[str]:
    text = "\n".join(lines).strip()
    if text:
        yield text


def _local_articles(paths: list[Path]) -> Iterator[str]:
    return articles(line for path in paths for line in _local_lines(path))


def _local_lines(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        return parquet_rows(path, "text")
    return (line for line, _ in read_lines(path, "error"))


def _hub_articles(stream: Any, name: str) -> Iterator[str]:
    return articles(text_column(stream, name))
