"""Files and folders that are either whole or absent.

A write goes to a temporary neighbour on the same file system, is flushed to the disk, and is renamed over the target: a
kill, a crash or a full disk leaves the old file, or none, and never half of a new one. The neighbour is called
``.NAME.HOST-PID-RANDOM.partial``: one whose process is dead is removed when the same target is written again.
"""

import errno
import os
import platform
import re
import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitnet.errors import InputError

TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # what a rename of a folder says where something has the name
NO_LINKS = (
    errno.EPERM,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
)  # file systems without hard links (FAT, some FUSE)


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Give a path to write to; on success it becomes ``target`` (replacing it), on any error it is removed."""
    target = Path(target)
    with _parents_of(target):
        partial = _neighbour(target)
        try:
            yield partial
            _sync(partial)
            os.replace(partial, target)
            _sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def new_file(target: str | Path) -> Iterator[Path]:
    """Give a path to write to; on success it becomes ``target``, on any error it is removed.

    Raises:
        InputError: ``target`` exists, or came to exist meanwhile. Nothing is ever replaced.
    """
    target = Path(target)
    _refuse_existing(target, "file")
    with _parents_of(target):
        partial = _neighbour(target)
        try:
            yield partial
            _sync(partial)
            _take_name(partial, target)
            _sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """Give an empty folder to fill; on success it becomes ``target``, on any error it is removed.

    Raises:
        InputError: ``target`` exists, or came to exist meanwhile. Nothing is ever merged into, or deleted from, a
            folder that was there before.
    """
    target = Path(target)
    _refuse_existing(target, "folder")
    with _parents_of(target):
        partial = _neighbour(target)
        partial.mkdir()
        try:
            yield partial
            for path in partial.rglob("*"):
                _sync(path)
            _refuse_existing(target, "folder")  # a rename would replace an empty folder without a word
            try:
                os.rename(partial, target)
            except OSError as error:
                if error.errno in TAKEN:
                    raise _exists(target, "folder") from None
                raise
            _sync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _take_name(partial: Path, target: Path) -> None:
    """Give a written file its name where nothing has it: a link fails if something does, a rename would replace it."""
    try:
        os.link(partial, target)
    except FileExistsError:
        raise _exists(target, "file") from None
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:  # the name is taken by an empty file first; only that one is replaced
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise _exists(target, "file") from None
        os.replace(partial, target)


def _refuse_existing(target: Path, what: str) -> None:
    if os.path.lexists(target):  # a link that leads nowhere has the name, too
        raise _exists(target, what)


def _exists(target: Path, what: str) -> InputError:
    return InputError(f"{target} exists already: name a new {what}, or move this one away")


@contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Make the folders above ``target``; on any error those made here go again, unless something else is in them."""
    made = [parent for parent in target.parents if not parent.exists()]  # innermost first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{target} cannot be written: {error.filename} is no folder, name another place") from error
    try:
        yield
    except BaseException:
        for parent in made:
            try:
                parent.rmdir()
            except OSError:  # others write there: it stays, and so do those above it
                break
        raise


def _neighbour(target: Path) -> Path:
    _remove_stale(target)
    return target.with_name(f".{target.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


def _remove_stale(target: Path) -> None:
    """Remove what writers of the same target left that were killed on this host."""
    of_this_host = re.compile(rf"\.{re.escape(target.name)}\.{_host()}-(\d+)-[0-9a-f]{{8}}\.partial")
    for path in target.parent.iterdir():
        found = of_this_host.fullmatch(path.name)
        if found is None or _runs(int(found[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _host() -> str:
    """Where a process number means something: the machine, and the container on it. Eight hexadecimal digits."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{zlib.crc32(f'{platform.node()} {namespace}'.encode()):08x}"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process; a number that none has
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def readable_bytes(number: float) -> str:
    """``1_500_000`` as ``1.5 MB``: what a person is told of a size."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
