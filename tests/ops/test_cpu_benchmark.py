"""benchmarks/kernels.py times what it says: nothing that is compiled once, and reading at its best."""

import argparse
import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
ROUNDS = argparse.Namespace(rounds=3, seconds=4.0)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("cpu_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clock:
    """Time that passes only where it is spent."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: list[float]) -> None:
        """The next of ``seconds``; the last for ever."""
        self.now += seconds.pop(0) if len(seconds) > 1 else seconds[0]


def reading(clock: Clock, seconds: list[float]) -> int:
    clock.spend(seconds)
    return 100


def test_compiling_in_the_first_two_calls_is_not_timed_and_every_round_is(benchmark):
    clock, calls = Clock(), []
    spent = [1000.0, 500.0, 5.0, 6.0, 7.0]

    def call(copy: int) -> None:
        calls.append(copy)
        clock.spend(spent)

    slow = benchmark.Contender("slow", call, copies=1, weight_bytes=10, slow=True)
    found = benchmark.measure([slow], lambda: reading(clock, [2.0]), clock, ROUNDS)
    assert found["slow"] == [5.0, 6.0, 7.0]
    assert calls == [0] * 5


def test_reading_is_the_best_pass_of_each_round(benchmark):
    clock = Clock()
    seconds = [3.0, 2.0, 1.0, 4.0, 5.0]  # the first two passes fill a turn, the next two the second, the fifth the last
    found = benchmark.measure([], lambda: reading(clock, seconds), clock, ROUNDS)
    assert found["read"] == [50.0, 100.0, 20.0]


def test_a_quick_contender_streams_through_its_copies_for_a_turn(benchmark):
    clock, calls = Clock(), []

    def call(copy: int) -> None:
        calls.append(copy)
        clock.spend([1.0])

    quick = benchmark.Contender("quick", call, copies=3, weight_bytes=10, calls=2)
    found = benchmark.measure([quick], lambda: reading(clock, [5.0]), clock, ROUNDS)
    assert found["quick"] == [0.5] * 3
    assert calls == [0, 1, 2] + [i % 3 for i in range(12)]
