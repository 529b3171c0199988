"""Files and folders that are either whole or absent.

A write goes to a temporary neighbour on the same file system, is flushed to the disk, and is renamed over the target: a
kill, a crash or a full disk leaves the old file, or none, and never half of a new one.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitnet.errors import InputError


def _neighbour(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Give a path to write to; on success it becomes ``target`` (replacing it), on any error it is removed."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _neighbour(target)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, target)
        _sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """Give an empty folder to fill; on success it becomes ``target``, on any error it is removed.

    Raises:
        InputError: ``target`` exists. Nothing is ever merged into, or deleted from, a folder that was there before.
    """
    target = Path(target)
    if target.exists():
        raise InputError(f"{target} exists already: name a new folder, or move this one away")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _neighbour(target)
    partial.mkdir()
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _sync(path)
        os.rename(partial, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
