"""The emulator as a fixture: the CUDA source compiled with g++ and its sanitizers, fed with launches."""

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitnet.ops.cuda.plan import Launch

FOLDER = Path(__file__).parent
SOURCES = FOLDER.parents[2] / "bitnet" / "ops" / "cuda"
FLAGS = "-std=c++17 -O1 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all"
WARNINGS = "-Wall -Wextra -Werror -Wno-unknown-pragmas"  # #pragma unroll

Emulate = Callable[..., None]


def build(target: Path, source: Path = SOURCES, flags: str = FLAGS) -> Path:
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no g++ on Linux here: that is what emulates the CUDA kernels")
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    main = ["-x", "c++", str(FOLDER / "emulate.cpp"), "-o", str(partial)]
    subprocess.run([compiler, *flags.split(), *WARNINGS.split(), f"-I{source}", f"-I{FOLDER}", *main], check=True)
    partial.rename(target)
    return target


def request_of(launches: list[Launch], buffers: list[Tensor], backwards: bool) -> bytes:
    """The request that emulate.cpp reads; it draws the bytes."""
    place = {each.data_ptr(): index for index, each in enumerate(buffers)}
    parts = [struct.pack("iii", backwards, len(buffers), len(launches))]
    for each in buffers:
        raw = bytes(each.reshape(-1).view(torch.uint8).numpy()) if each.numel() else b""
        parts += [struct.pack("q", len(raw)), raw]
    for launch in launches:
        name = launch.kernel.encode()
        parts += [struct.pack("i", len(name)), name, struct.pack("iii", *launch.grid, launch.threads)]
        parts.append(struct.pack("i", len(launch.arguments)))
        for argument in launch.arguments:
            if isinstance(argument, Tensor):
                parts.append(struct.pack("ii", 1, place[argument.data_ptr()]))
            else:
                parts.append(struct.pack("ii", *((2, 0) if argument is None else (0, argument))))
    return b"".join(parts)


class Emulator:
    """Runs launches on CPU tensors, which it changes in place as a GPU would."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([self.program], stdin=pipe, stdout=pipe, stderr=pipe, env=environment)

    def stop(self) -> str:
        """What it complained of."""
        self.process.kill()
        return self.process.communicate()[1].decode()

    def run(self, launches: list[Launch], backwards: bool = False) -> None:
        tensors = [each for launch in launches for each in launch.arguments if isinstance(each, Tensor)]
        buffers = list({each.data_ptr(): each for each in tensors}.values())
        sizes = [each.numel() * each.element_size() for each in buffers]
        try:
            self.process.stdin.write(request_of(launches, buffers, backwards))
            self.process.stdin.flush()
            answers = [self.process.stdout.read(size) for size in sizes]
        except BrokenPipeError:
            answers = []
        if [len(each) for each in answers] != sizes:
            complaint = self.stop()
            self.start()  # the next test is another one
            raise RuntimeError(complaint)
        for each, answer in zip(buffers, answers, strict=True):
            if answer:
                each.copy_(torch.frombuffer(bytearray(answer), dtype=each.dtype).view(each.shape))


@pytest.fixture(scope="session")
def build_emulator() -> Callable[..., Path]:
    return build


@pytest.fixture(scope="session")
def emulator_of() -> type[Emulator]:
    return Emulator


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # one folder for all workers of a run
    target = folder / "emulate"
    return target if target.exists() else build(target)


@pytest.fixture(scope="session")
def emulator(program: Path) -> Iterator[Emulator]:
    emulator = Emulator(program)
    yield emulator
    emulator.stop()
