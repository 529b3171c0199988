"""The kernels as machine code, by NVRTC: the compiler library that every CUDA build of PyTorch brings along.

A user needs no toolkit, no headers and no C++ compiler, and compiling takes about two seconds. It needs no GPU either,
so that the machine code for every architecture can be examined anywhere (tests/ops/cuda/test_machine_code.py). Machine
code is kept in the user's cache folder, under a name with two digests::

    ~/.cache/bitnet/kernels/packed_linear-<source, options, compiler>-<content>.cubin

A file whose content is not what its name says is damaged, and is built again. It is written under another name and then
renamed: two processes that compile at once both leave a whole file, and neither waits. A damaged file is never removed
before a whole one is there, and never under the name of the whole one: another process may just have put it there.
Without a folder that can be written every process compiles for itself.
"""

import ctypes
import functools
import hashlib
import importlib.util
from pathlib import Path

import torch

from bitnet.errors import InputError
from bitnet.files import atomic_file
from bitnet.ops.build import BuildError, FolderError, default_folder

SOURCE = Path(__file__).with_name("packed_linear.cu")
OPTIONS = ("--std=c++17",)  # divisions and denormal numbers are IEEE's without an option
OLDEST = 80  # bfloat16, asynchronous copies and mma.m16n8k32 of int8 begin with sm_80
MAJORS = (13, 12)  # of CUDA, whose library is looked for where torch is built for none


def machine_code(capability: tuple[int, int], folder: Path | None = None) -> bytes:
    """A cubin for this compute capability, from the cache or compiled.

    Args:
        capability: (major, minor) of the device.
        folder: cache, by default ``bitnet/kernels`` in the user's cache folder.

    Raises:
        BuildError: a device older than sm_80 or newer than the compiler, no NVRTC, or an error of it.
    """
    compiler = library()
    architecture = architecture_for(capability, supported_architectures(compiler))
    source = SOURCE.read_bytes()
    options = (f"--gpu-architecture=sm_{architecture}", *OPTIONS)
    key = digest("\0".join((*options, *map(str, version(compiler)))).encode() + source)
    try:
        folder = default_folder() if folder is None else folder
        cached, damaged = find_cached(folder, key)
    except (OSError, FolderError):  # machine code needs no file: without a folder it is compiled in every process
        return compiled(compiler, source, options)
    if cached is not None:
        return cached
    code = compiled(compiler, source, options)
    try:
        path = folder / f"packed_linear-{key}-{digest(code)}.cubin"
        with atomic_file(path) as partial:
            partial.write_bytes(code)
        for each in damaged:
            if each != path:
                each.unlink(missing_ok=True)
    except (OSError, InputError):  # a home that cannot be written to costs the next process two seconds
        pass
    return code


def architecture_for(capability: tuple[int, int], supported: list[int]) -> int:
    """The newest architecture whose machine code runs on the device: the same major number, no higher minor one.

    Raises:
        BuildError: there is none.
    """
    major, minor = capability
    own = major * 10 + minor
    if own < OLDEST:
        raise BuildError(f"the kernels need compute capability 8.0, and this device has {major}.{minor}")
    fitting = [each for each in supported if each // 10 == major and each <= own]
    if not fitting:
        raise BuildError(f"this NVRTC does not know sm_{own}, its newest is sm_{max(supported)}: update torch")
    return max(fitting)


def find_cached(folder: Path, key: str) -> tuple[bytes | None, list[Path]]:
    """The whole cubin of this key, None if there is none; and damaged files of it."""
    damaged = list[Path]()
    for path in sorted(folder.glob(f"packed_linear-{key}-*.cubin")):
        try:
            code = path.read_bytes()
        except FileNotFoundError:  # another process has removed it
            continue
        if path.stem.rpartition("-")[2] == digest(code):
            return code, damaged
        damaged.append(path)
    return None, damaged


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC: the one that torch has loaded, or that a wheel of NVIDIA or the system has.

    Raises:
        BuildError: there is none.
    """
    majors = MAJORS if torch.version.cuda is None else (int(torch.version.cuda.split(".")[0]),)  # as the driver is
    for major in majors:
        for folder in wheel_folders():
            path = folder / f"libnvrtc.so.{major}"
            if path.exists():
                for part in folder.glob(f"libnvrtc-builtins.so.{major}*"):
                    ctypes.CDLL(str(part))  # NVRTC asks for it by name, and the loader does not look beside it
                return ctypes.CDLL(str(path))
        try:
            return ctypes.CDLL(f"libnvrtc.so.{major}")
        except OSError:
            continue
    names = " and ".join(f"libnvrtc.so.{major}" for major in majors)
    wheel = "nvidia-cuda-nvrtc-cu12" if majors[0] == 12 else f'"nvidia-cuda-nvrtc=={majors[0]}.*"'
    raise BuildError(f"no NVRTC: looked for {names}, which torch's wheels for CUDA bring along: pip install {wheel}")


def wheel_folders() -> list[Path]:
    """The folders of libraries of the wheels ``nvidia-*`` that are installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    return sorted(folder for root in roots for folder in Path(root).glob("*/lib"))


def version(compiler: ctypes.CDLL) -> tuple[int, int]:
    """(major, minor) of CUDA."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    check(compiler, compiler.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def supported_architectures(compiler: ctypes.CDLL) -> list[int]:
    """The numbers of sm_NN that it compiles for, ascending."""
    count = ctypes.c_int()
    check(compiler, compiler.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    numbers = (ctypes.c_int * count.value)()
    check(compiler, compiler.nvrtcGetSupportedArchs(numbers))
    return sorted(numbers)


def compiled(compiler: ctypes.CDLL, source: bytes, options: tuple[str, ...]) -> bytes:
    """The cubin of ``source``.

    Raises:
        BuildError: what the compiler complained of.
    """
    program = ctypes.c_void_p()
    check(compiler, compiler.nvrtcCreateProgram(ctypes.byref(program), source, SOURCE.name.encode(), 0, None, None))
    try:
        arguments = (ctypes.c_char_p * len(options))(*(each.encode() for each in options))
        if compiler.nvrtcCompileProgram(program, len(options), arguments) != 0:
            log = result_of(compiler, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise BuildError(f"NVRTC refused {SOURCE.name} with {' '.join(options)}:\n{log}")
        return result_of(compiler, program, "CUBIN")
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


def result_of(compiler: ctypes.CDLL, program: ctypes.c_void_p, name: str) -> bytes:
    size = ctypes.c_size_t()
    check(compiler, getattr(compiler, f"nvrtcGet{name}Size")(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    check(compiler, getattr(compiler, f"nvrtcGet{name}")(program, content))
    return content.raw


def check(compiler: ctypes.CDLL, status: int) -> None:
    if status != 0:
        compiler.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise BuildError(f"NVRTC failed: {compiler.nvrtcGetErrorString(status).decode(errors='replace')}")
