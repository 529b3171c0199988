"""benchmarks/gpu.py works on a CPU as far as a CPU goes, so that its first run on a GPU is not lost to a slip."""

import importlib
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


@pytest.fixture
def checks(benchmark):
    return importlib.import_module("gpu_checks")


@pytest.mark.filterwarnings("ignore:packed layers run on int8")  # without a C++ compiler
def test_the_rehearsal_checks_bits_and_times(benchmark, monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(benchmark.CHECKS, "torch.compile(fullgraph=True)")  # 9 seconds
    assert benchmark.main(["--rehearse", "--out", str(tmp_path / "gpu.md")]) == 0
    report = (tmp_path / "gpu.md").read_text()
    assert capsys.readouterr().out == report
    assert "| bits of the operator, all dtypes and shapes | passed" in report
    assert "| trained, frozen and packed layers agree | passed" in report
    assert "| a new thread | passed" in report
    assert "\n| 64 x 128 | 20 |" in report
    assert "\n| nano | packed | launched |" in report


def test_wrong_bits_and_broken_checks_are_reported(checks, monkeypatch):
    monkeypatch.setattr(checks, "packed_linear", lambda x, *rest: checks.reference_linear(x, *rest) * 1.0000001)
    monkeypatch.setattr(checks, "CHECKS", {"bits": checks.check_bits, "broken": lambda *_: 1 / 0})
    found = [checks.checked(name, torch.device("cpu"), small=True) for name in checks.CHECKS]
    assert "cases differ, first: 1 x 1 -> 1" in found[0][0]
    assert "ZeroDivisionError" in found[1][0]
    assert [passed for _, passed in found] == [False, False]


def test_what_is_done_is_not_run_again_and_what_failed_is(benchmark, tmp_path):
    ran = []

    def part(name, outcome):
        def run():
            ran.append(name)
            if isinstance(outcome, Exception):
                raise outcome
            return [f"| {name} |"], outcome

        return benchmark.Part(name, "checks", run)

    def go(parts, seconds=60, machine="one"):
        ran.clear()
        kept = benchmark.Kept(tmp_path / "gpu.json", {"device": machine, "torch": "", "cuda": "", "driver": ""})
        kept.load()
        failed, left = benchmark.run_parts(parts, kept, seconds)
        return "\n".join(benchmark.report(parts, kept, failed, left)), list(ran)

    report, done = go([part("a", True), part("b", False), part("c", MemoryError("full")), part("d", True)])
    assert done == ["a", "b", "c", "d"]
    assert all(each in report for each in ("| a |", "| b |", "c: MemoryError: full", "FAILED: b", "FAILED: c"))
    report, done = go([part("a", True), part("b", True), part("c", True), part("d", True)])
    assert done == ["b", "c"]
    assert "| a |\n| b |\n| c |\n| d |" in report
    assert "FAILED" not in report
    assert go([part("a", True)], machine="another")[1] == ["a"]
    report, done = go([part("a", True), part("z", True)], seconds=-1, machine="another")
    assert done == []
    assert "Not run, the time was over: z." in report


def test_the_roofline_is_bytes_over_bandwidth(benchmark):
    h100 = next(line for line in benchmark.roofline() if "H100" in line)
    assert f"{(13824 * 2560 / 4 + 4 * 13824 + 2 * (13824 + 2560)) / 3350e9 * 1e6:.2f} µs" in h100


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(benchmark, capsys):
    assert benchmark.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
