"""Reading documents from lines of JSON, plain or gzipped, with an error that names the line.

The libraries' readers say neither which file is truncated nor which line is broken, and take a missing text field for
no text. Here a bad line is an error with its place, or is skipped and counted when that was asked for.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from bitnet.data.sources import OnBadLine
from bitnet.errors import InputError


def read_json_lines(
    path: Path, skipped: dict[str, int], *, field: str = "text", on_bad_line: OnBadLine = "error"
) -> Iterator[str]:
    """The documents of a ``.jsonl``, ``.json`` or ``.json.gz`` file, without those that hold only white space.

    Args:
        path: The file; gzip is told from the suffix.
        skipped: Where ``skip`` counts, under the file's path. A repeated reading does not count a line twice.
        field: The key of the text in each line's object.
        on_bad_line: ``error`` raises; ``skip`` leaves the line out and counts it.

    Raises:
        InputError: A bad line (``error`` only), a truncated or damaged gzip file, or a file without any document.
    """
    bad, found = 0, False
    for number, line in enumerate(_lines(path), start=1):
        text = _text(line, field)
        if text is None:
            if on_bad_line == "error":
                raise InputError(
                    f'{path.name}:{number}: expected a JSON object with a string in "{field}", got {_excerpt(line)}: '
                    "repair the line, or set data.source.on_bad_line=skip to leave such lines out and count them"
                )
            bad += 1
            skipped[str(path)] = max(bad, skipped.get(str(path), 0))
        elif text.strip():
            found = True
            yield text
    if not found:
        raise InputError(f"{path} holds no documents: remove it, or download it again")


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is truncated or damaged ({error}): download it again") from error


def _text(line: bytes, field: str) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: not JSON, or not UTF-8
        return None
    text = record.get(field) if isinstance(record, dict) else None
    return text if isinstance(text, str) else None


def _excerpt(line: bytes, limit: int = 80) -> str:
    text = line.strip().decode("utf-8", errors="backslashreplace")
    return repr(text if len(text) <= limit else text[:limit] + "...")
