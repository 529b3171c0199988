"""benchmarks/gpu.py works on a CPU as far as a CPU goes, so that its first run on a GPU is not lost to a slip."""

import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[3] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:packed layers run on int8")  # without a C++ compiler
def test_the_rehearsal_checks_bits_and_times(benchmark, monkeypatch):
    monkeypatch.delitem(benchmark.CHECKS, "torch.compile(fullgraph=True)")  # 9 seconds
    lines, passed = benchmark.report(torch.device("cpu"), rehearse=True)
    assert passed
    assert "| bits of the operator, all dtypes and shapes | passed" in "\n".join(lines)
    assert any(line.startswith("| 64 x 128 | 20 |") for line in lines)


def test_wrong_bits_and_broken_checks_are_reported(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "packed_linear", lambda x, *rest: benchmark.reference_linear(x, *rest) * 1.0000001)
    monkeypatch.setattr(benchmark, "CHECKS", {"bits": benchmark.check_bits, "broken": lambda *_: 1 / 0})
    lines, passed = benchmark.checked(torch.device("cpu"), small=True)
    assert not passed
    assert "cases differ, first: 1 x 1 -> 1" in lines[2]
    assert "ZeroDivisionError" in lines[3]


def test_the_roofline_is_bytes_over_bandwidth(benchmark):
    h100 = next(line for line in benchmark.roofline() if "H100" in line)
    assert f"{(13824 * 2560 / 4 + 4 * 13824 + 2 * (13824 + 2560)) / 3350e9 * 1e6:.2f} µs" in h100


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(benchmark, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert benchmark.main() == 2
    assert "no CUDA device" in capsys.readouterr().err
