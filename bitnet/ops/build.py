"""The C++ kernels as a shared library: compiled once with the machine's own compiler, then taken from a cache.

The library holds every instruction set that the architecture may have and chooses at run time, so one file serves all
machines that share a home directory. Its name holds two digests::

    ~/.cache/bitnet/kernels/packed_linear-<sources, compiler, flags>-<content>.so

A file whose content is not what its name says is damaged, and is built again. It is compiled under another name and
then renamed: two processes that compile at once both leave a whole file, and neither waits.
"""

import hashlib
import os
import platform
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


class BuildError(RuntimeError):
    """There is no library, and why: no compiler, an error of the compiler, a folder that cannot be written."""


def library(folder: Path | None = None) -> Path:
    """Path of the compiled library; compiles (seconds, once) unless ``folder`` holds it already.

    Args:
        folder: cache, by default ``bitnet/kernels`` in the user's cache folder (``XDG_CACHE_HOME``).

    Raises:
        BuildError: nothing could be compiled.
    """
    folder = default_folder() if folder is None else folder
    compiler = find_compiler()
    refusals = []
    for flags in (FLAGS + OPENMP, FLAGS):  # Apple's clang comes without OpenMP: one thread is better than none
        key = build_key(compiler, flags)
        cached = find_cached(folder, key)
        if cached is not None:
            return cached
        try:
            return build(compiler, flags, folder, key)
        except BuildError as error:
            refusals.append(str(error))
    raise BuildError(refusals[-1])


def default_folder() -> Path:
    """The user's cache folder for kernels."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "bitnet" / "kernels"


def find_compiler() -> str:
    """The C++ compiler: ``CXX`` where it is set, else the first of g++, clang++ and c++ on the path.

    Raises:
        BuildError: there is none.
    """
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise BuildError(f"no C++ compiler: looked for {', '.join(names)} on the path")
    return found


def build_key(compiler: str, flags: tuple[str, ...]) -> str:
    """Digest of all that decides what the library does: sources, compiler and its version, flags, architecture."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = run_compiler([compiler, "--version"])
    for part in (compiler, version, *flags, platform.system(), platform.machine()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def find_cached(folder: Path, key: str) -> Path | None:
    """The whole library of this key in ``folder``, None if there is none; removes damaged ones."""
    for path in sorted(folder.glob(f"packed_linear-{key}-*.so")):
        if path.stem.rpartition("-")[2] == content_digest(path):
            return path
        path.unlink(missing_ok=True)
    return None


def build(compiler: str, flags: tuple[str, ...], folder: Path, key: str) -> Path:
    """Compile into ``folder``.

    Raises:
        BuildError: the compiler fails, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as scratch:  # the same file system
            made = Path(scratch) / "library.so"
            run_compiler([compiler, *flags, str(SOURCES / MAIN), "-o", str(made)])
            target = folder / f"packed_linear-{key}-{content_digest(made)}.so"
            os.replace(made, target)
    except OSError as error:
        raise BuildError(f"cannot write the compiled library to {folder}: {error}") from error
    return target


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
