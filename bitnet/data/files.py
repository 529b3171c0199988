"""Text out of the user's own files: UTF-8 lines and parquet columns, with errors that name the place."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bitnet.errors import InputError

InvalidUtf8 = Literal["error", "replace"]


def stat_fingerprint(paths: list[Path]) -> str:
    """A hash over names, sizes and modification times: quick, and a change of it costs only a new token cache."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_lines(path: Path, invalid_utf8: InvalidUtf8) -> Iterator[tuple[str, bool]]:
    """Each line of a UTF-8 file with its newline, and whether bytes of it had to be replaced by U+FFFD.

    Raises:
        InputError: Bytes that are not UTF-8 (``error`` only).
    """
    offset = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                yield line.decode("utf-8"), False
            except UnicodeDecodeError as error:
                if invalid_utf8 == "error":
                    byte = error.object[error.start]
                    raise InputError(
                        f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}: convert the file, "
                        "or set data.source.invalid_utf8=replace to read such bytes as U+FFFD and count the lines"
                    ) from error
                yield line.decode("utf-8", errors="replace"), True
            offset += len(line)


def parquet_rows(path: Path, field: str) -> Iterator[str]:
    """The strings of one column, row group by row group.

    Raises:
        InputError: Not a parquet file, no such column, or a row without text in it.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file ({error}): download or write it again") from error
    with table:
        if field not in table.schema_arrow.names:
            raise InputError(f"{path} has no column {field!r} (it has {', '.join(table.schema_arrow.names)})")
        row = 0
        for batch in table.iter_batches(columns=[field]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise InputError(
                        f"{path}: row {row} holds {text!r} in {field!r}, expected a string: drop such rows"
                    )
                yield text
                row += 1
