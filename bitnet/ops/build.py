"""The C++ kernels as a shared library: compiled once with the machine's own compiler, then taken from a cache.

The library holds every instruction set that the architecture may have and chooses at run time, so one file serves all
machines that share a home directory. Its name holds two digests::

    ~/.cache/bitnet/kernels/packed_linear-<sources, compiler, flags>-<content>.so

A file whose content is not what its name says is damaged, and is built again. It is compiled under another name and
then renamed: two processes that compile at once both leave a whole file, and neither waits. No process removes a file:
another one may have just mended it. A user without a cache folder that can be written is told by `FolderError`, and may
name another one.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
MAIN = "packed_linear.cpp"
# No contraction: a fused multiply and add rounds once where the reference rounds twice.
FLAGS = ("-O2", "-ftree-vectorize", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
OPENMP = ("-fopenmp",)
COMPILERS = ("g++", "clang++", "c++")
SECONDS = 600  # longer than any machine needs
ROOT = 0  # number of the user who owns what all users may run


class BuildError(RuntimeError):
    """There is no library, why, and what to do: no compiler, or an error of the compiler."""


class FolderError(BuildError):
    """The folder for the library cannot be written, or the user has none."""


def library(folder: Path | None = None) -> Path:
    """Path of the compiled library; compiles (seconds, once) unless ``folder`` holds it already.

    Args:
        folder: cache, by default ``bitnet/kernels`` in the user's cache folder (``XDG_CACHE_HOME``).

    Raises:
        FolderError: ``folder`` cannot be written, or there is no default one; nothing was compiled.
        BuildError: nothing could be compiled.
    """
    folder = default_folder() if folder is None else folder
    compiler = find_compiler()
    refusals = []
    for flags in (FLAGS + OPENMP, FLAGS):  # Apple's clang comes without OpenMP: one thread is better than none
        key = build_key(compiler, flags)
        try:
            cached = find_cached(folder, key)
        except OSError as error:
            raise FolderError(f"cannot use the cache {folder}: {error}") from error
        if cached is not None:
            return cached
        try:
            return build(compiler, flags, folder, key)
        except FolderError:
            raise
        except BuildError as error:
            refusals.append(str(error))
    raise BuildError(refusals[-1])


def default_folder() -> Path:
    """The user's cache folder for kernels.

    Raises:
        FolderError: the user has no home, as in a container that runs under a number without a name.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(cache).expanduser() / "bitnet" / "kernels"
    except RuntimeError as error:
        raise FolderError(f"no home for {cache}: set HOME or XDG_CACHE_HOME to a folder that can be written") from error


def find_compiler() -> list[str]:
    """The C++ compiler as the first words of a command: ``CXX`` where set, else the first of g++, clang++ and c++.

    ``CXX`` is a path, or words as in a shell: ``ccache g++``.

    Raises:
        BuildError: there is none.
    """
    wanted = os.environ.get("CXX", "").strip()
    if not wanted:
        found = next((path for path in map(shutil.which, COMPILERS) if path), None)
        if found is None:
            raise BuildError(
                f"no C++ compiler: looked for {', '.join(COMPILERS)} on the path (Debian: apt install g++)"
            )
        return [found]
    try:
        words = [wanted] if shutil.which(wanted) else shlex.split(wanted)  # a path may have spaces
    except ValueError as error:
        raise BuildError(f"CXX must be a command, got {wanted!r}: {error}") from error
    found = shutil.which(words[0])
    if found is None:
        raise BuildError(
            f"no C++ compiler: CXX is {wanted!r}, and {words[0]!r} is not on the path: correct or unset CXX"
        )
    return [found, *words[1:]]


def build_key(compiler: list[str], flags: tuple[str, ...]) -> str:
    """Digest of all that decides what the library does: sources, compiler and its version, flags, architecture."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = run_compiler([*compiler, "--version"])
    for part in (*compiler, version, *flags, platform.system(), platform.machine()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def find_cached(folder: Path, key: str) -> Path | None:
    """The whole library of this key in ``folder``, None if there is none.

    Raises:
        FolderError: there is one that another user made, who could have put anything into it.
    """
    for path in sorted(folder.glob(f"packed_linear-{key}-*.so")):
        if path.stem.rpartition("-")[2] != content_digest(path):
            continue
        if owner_of(path) not in (ROOT, os.geteuid() if hasattr(os, "geteuid") else ROOT):
            raise FolderError(
                f"{path} belongs to another user (number {owner_of(path)}), who could put anything into it: set "
                "XDG_CACHE_HOME to a folder of your own"
            )
        return path
    return None


def owner_of(path: Path) -> int:
    return path.stat().st_uid


def build(compiler: list[str], flags: tuple[str, ...], folder: Path, key: str) -> Path:
    """Compile into ``folder``.

    Raises:
        FolderError: the folder cannot be written.
        BuildError: the compiler fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as scratch:  # the same file system
            made = Path(scratch) / "library.so"
            run_compiler([*compiler, *flags, str(SOURCES / MAIN), "-o", str(made)])
            target = folder / f"packed_linear-{key}-{content_digest(made)}.so"
            os.replace(made, target)
    except OSError as error:
        raise FolderError(f"cannot write the compiled library to {folder}: {error}") from error
    return target


def openmp_problem() -> str | None:
    """Why the compiler makes no program with threads, None if it does."""
    with tempfile.TemporaryDirectory(prefix="bitnet-openmp-") as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("int main() { return 0; }\n")
        try:
            run_compiler([*find_compiler(), *OPENMP, str(source), "-o", str(Path(folder) / "empty")])
        except BuildError as error:
            return str(error)
    return None


def run_compiler(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    return done.stdout


def content_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
