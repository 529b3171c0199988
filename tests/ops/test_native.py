"""The compiled kernels: every tier gives the reference's bits, damage to the cache is mended, and what runs is said."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bitnet.ops import build, cpu
from bitnet.ops.native import TIERS, Native
from bitnet.ops.packed_linear import reference_linear
from bitnet.quant.packing import pack

HERE = Path(__file__).parent
CHECK = [str(HERE / "check.cpp"), f"-I{build.SOURCES}", "-std=c++17", "-ffp-contract=off", "-fopenmp"]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
EMULATE = [f'-DBITNET_EMULATE="{HERE / "emulate.h"}"']


@pytest.fixture(scope="module")
def native() -> Native:
    return Native(build.library())


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("layout", ["i2", "t5", "b1"])
def test_every_tier_of_this_processor_gives_the_references_bits(native, tier, layout):
    if tier not in native.tiers:
        pytest.skip(f"this processor has no {tier}; the emulation below runs it")
    for rows in (1, 2, 3, 8, 17, 37):
        for columns, out in ((1, 1), (319, 66), (1285, 35)):
            codes = torch.randint(0, 2, (out, columns), dtype=torch.int8) * 2 - 1
            if layout != "b1":
                codes[torch.rand(out, columns) < 0.4] = 0
            x = torch.randn(rows, columns, dtype=torch.bfloat16)
            args = x, pack(codes, layout), torch.rand(out, 1), torch.randn(out), layout, "absmax"
            assert torch.equal(native(*args, tier=tier), reference_linear(*args))


@pytest.mark.parametrize(
    "where",
    [
        lambda x, bias: True,
        lambda x, bias: x.dtype == torch.bfloat16,
        lambda x, bias: x.dtype == torch.float16,
        lambda x, bias: bias is not None,
        lambda x, bias: bias is not None and bias.dtype == torch.float16 and len(x) == 33,
    ],
    ids=["everywhere", "bfloat16", "float16", "bias", "one of all"],
)
def test_a_tier_that_answers_wrong_is_found_and_not_chosen(native, monkeypatch, where):
    class Wrong(Native):
        def __call__(self, *arguments, **options):
            y = super().__call__(*arguments, **options)
            return y + (0.5 if arguments[-1] == self.tiers[0] and where(arguments[0], arguments[3]) else 0)

    monkeypatch.setattr(cpu, "Native", Wrong)
    chosen = cpu.choice.__wrapped__()
    assert chosen.name == native.tiers[1]
    assert "wrong results" in chosen.refused[native.tiers[0]]


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_tiers_are_exact_and_clean_under_sanitizers_with_what_is_missing_emulated(tmp_path):
    run(["g++", "-O1", *SANITIZE, *EMULATE, *CHECK, "-o", str(tmp_path / "check")])
    lines = run([str(tmp_path / "check")]).splitlines()
    assert [line for line in lines if "0 differences" in line] == [
        line for line in lines if not line.startswith("neon")
    ]
    assert any(line.startswith("amx: ") for line in lines)


@pytest.mark.slow
def test_the_neon_tier_is_exact_under_qemu(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    run([compiler, "-O2", "-static", *CHECK, "-o", str(tmp_path / "check")])
    assert "neon: 210 cases, 0 differences" in run([emulator, "-cpu", "max", str(tmp_path / "check")])
    assert "neon did not run" in run([emulator, "-cpu", "cortex-a53", str(tmp_path / "check")])  # has no dot product


@pytest.fixture
def quick(monkeypatch, tmp_path) -> Path:
    """A compiler that makes its file at once; returns the file of its calls."""
    calls, fake = tmp_path / "calls", tmp_path / "compiler"
    script = (
        f'case "$*" in *--version*) echo 1;; *) echo . >> {calls}; for last; do :; done; echo library > "$last";; esac'
    )
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    return calls


def test_a_library_is_compiled_once_and_again_where_its_file_is_damaged(quick, tmp_path):
    first = build.library(tmp_path / "cache")
    assert build.library(tmp_path / "cache") == first
    assert quick.read_text().count(".") == 1
    for damage in (b"", b"libr", b"Library\n"):
        first.write_bytes(damage)
        assert build.library(tmp_path / "cache").read_bytes() == b"library\n"
    assert quick.read_text().count(".") == 4
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]


def test_another_source_or_compiler_gets_a_library_of_its_own(quick, tmp_path, monkeypatch):
    first = build.library(tmp_path / "cache")
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    assert build.library(tmp_path / "cache") == first
    with (tmp_path / "csrc" / "task.h").open("a") as file:
        file.write("// changed\n")
    assert build.library(tmp_path / "cache") != first


def test_threads_that_compile_at_once_all_get_a_whole_library(quick, tmp_path):
    found = list[bytes]()
    threads = [
        threading.Thread(target=lambda: found.append(build.library(tmp_path / "cache").read_bytes())) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"library\n"] * 6


def test_a_compiler_without_openmp_makes_a_library_all_the_same(tmp_path, monkeypatch):
    fake = tmp_path / "compiler"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) exit 0;; *fopenmp*) echo no openmp >&2; exit 1;; esac\n'
        'for last; do :; done; echo x > "$last"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert build.library(tmp_path / "cache").read_text() == "x\n"


@pytest.mark.parametrize("command", ["env {}", "env A=1 '{}'", "{}"])
def test_a_compiler_may_be_a_command_of_several_words(quick, tmp_path, monkeypatch, command):
    spaced = tmp_path / "a folder" / "compiler"
    spaced.parent.mkdir()
    (tmp_path / "compiler").rename(spaced)
    path = shutil.copy(spaced, tmp_path / "plain") if command == "env {}" else spaced
    monkeypatch.setenv("CXX", command.format(path))
    assert build.library(tmp_path / "cache").read_bytes() == b"library\n"


def test_every_word_of_the_compiler_is_in_the_name(quick, tmp_path, monkeypatch):
    plain = build.library(tmp_path / "cache")
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -O0")
    assert build.library(tmp_path / "cache") != plain
    monkeypatch.setenv("CXX", "g++ 'unbalanced")
    with pytest.raises(build.BuildError, match="CXX must be a command"):
        build.library(tmp_path / "cache")


@pytest.mark.parametrize("lacks", ["home", "folder", "damaged"])
def test_without_a_cache_folder_the_kernels_are_compiled_loaded_and_removed(lacks, native, tmp_path, monkeypatch):
    made = native.path
    temporary, blocked = tmp_path / "temporary", tmp_path / "file"
    temporary.mkdir()
    blocked.write_text("no folder")
    monkeypatch.setattr(build.tempfile, "tempdir", str(temporary))
    if lacks == "home":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "expanduser", homeless)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(blocked if lacks == "folder" else tmp_path / "cache"))
    if lacks == "damaged":  # and cannot be removed
        monkeypatch.setattr(
            build, "find_cached", lambda folder, key: refuse() if folder.is_relative_to(tmp_path / "cache") else None
        )
    modes = list[int]()

    def compile_quickly(command: list[str]) -> str:
        if "-o" in command:
            modes.extend(path.stat().st_mode & 0o777 for path in temporary.iterdir())
            shutil.copy(made, command[-1])
        return ""

    monkeypatch.setattr(build, "run_compiler", compile_quickly)
    with pytest.warns(RuntimeWarning, match="compiled for this process alone"):
        chosen = cpu.choice.__wrapped__()
    assert chosen.name == native.tiers[0]
    assert modes == [0o700]
    assert not list(temporary.iterdir())


def homeless(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


def refuse() -> None:
    raise PermissionError("read-only")


def test_a_library_that_another_user_made_is_not_loaded(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "owner_of", lambda path: 4242)
    build.library(tmp_path / "cache")  # just compiled
    with pytest.raises(build.FolderError, match=r"belongs to another user \(number 4242\)"):
        build.library(tmp_path / "cache")


def test_where_programs_may_not_run_the_library_is_loaded_from_another_place(native, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def forbidden(path: Path) -> Native:
        if path.is_relative_to(tmp_path):
            raise OSError("failed to map segment from shared object")
        return native

    monkeypatch.setattr(cpu, "Native", forbidden)
    monkeypatch.setattr(
        build, "run_compiler", lambda command: shutil.copy(native.path, command[-1]) if "-o" in command else ""
    )
    with pytest.warns(RuntimeWarning, match=r"failed to map segment.*noexec, set XDG_CACHE_HOME"):
        assert cpu.compiled() is native


def test_why_there_are_no_threads_is_said(tmp_path, monkeypatch):
    fake = tmp_path / "compiler"
    fake.write_text('#!/bin/sh\ncase "$*" in *fopenmp*) echo no openmp here >&2; exit 1;; esac\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert "no openmp here" in build.openmp_problem()
    monkeypatch.delenv("CXX")
    assert build.openmp_problem() is None


FORKED = """
import os, signal, torch
from bitnet.ops import packed_linear
torch.set_num_threads(2)
x, weight, scale = torch.ones(64, 512), torch.full((512, 128), 0b10101010, dtype=torch.uint8), torch.ones(1, 1)
expected = packed_linear(x, weight, scale, None, "i2").sum().item()
child = os.fork()
if not child:
    signal.alarm(60)
    os._exit(packed_linear(x, weight, scale, None, "i2")[0, 0].item() != 512)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_does_not_wait_for_threads_that_it_lacks():
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED]).returncode == 0


@pytest.mark.parametrize("compiler", ["none-such", "false"])
def test_without_a_working_compiler_the_int8_product_runs_and_a_warning_says_so(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="packed layers run on int8"):
        chosen = cpu.choice.__wrapped__()
    assert chosen.native is None
    assert compiler in chosen.refused["native"]


def test_the_advice_is_about_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "none-such -O2")
    with pytest.warns(RuntimeWarning, match="'none-such' is not on the path: correct or unset CXX") as caught:
        cpu.choice.__wrapped__()
    assert "apt install" not in str(caught[0].message)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="apt install"):
        cpu.choice.__wrapped__()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["", "none-such"])
def test_the_command_prints_what_runs(compiler, tmp_path):
    environment = {**os.environ, "CXX": compiler}
    if compiler:
        environment["XDG_CACHE_HOME"] = str(tmp_path)
    out = run([sys.executable, "-W", "ignore", "-m", "bitnet.ops"], env=environment)
    (chosen,) = [line.split()[1] for line in out.splitlines() if line.startswith("  * ")]
    assert chosen == (cpu.choice().name if not compiler else "int8")
    assert "threads" in out
