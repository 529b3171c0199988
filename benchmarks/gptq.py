"""How fast is GPTQ here, beside the loops that its paper and its published code have, and how does it grow?

    python benchmarks/gptq.py                    # 2048x2048 and 2048x5632, at equal results
    python benchmarks/gptq.py --what width       # time and memory of one layer against its width, a power law fitted
    python benchmarks/gptq.py --threads 1

All loops get the same weight, Hessian and 4-bit grid (groups of 128, fitted beforehand) and are timed in turn in one
process, round after round; printed are medians, ratios, and how much the results differ. ``textbook`` updates the whole
rest of the matrix after each column (algorithm 1 without its blocks); ``published`` is the lazy batch of algorithm 1:
blocks of 128 columns, column by column inside a block, on the weight as it lies [out, in].
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bitnet.ptq import GPTQ, LayerStats
from bitnet.ptq.hessian import inverse_factor, relative_error
from bitnet.quant import QTensor
from bitnet.quant.grid import Grid

LAYERS = ((2048, 2048), (2048, 5632))
WIDTHS = (512, 1024, 2048, 4096)
GRID = Grid(4)
METHOD = GPTQ(order="none")
DAMPING = 0.01

# Linears of a block as (out, in), and blocks: Llama 2's published shapes.
MODELS = {
    "7B": (((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),), 32),
    "70B": (((8192, 8192),) * 2 + ((1024, 8192),) * 2 + ((28672, 8192),) * 2 + ((8192, 28672),), 80),
}


def problem(out: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs of different sizes."""
    torch.manual_seed(0)
    x = torch.randn(2 * columns, columns) * torch.rand(columns).exp()
    x += torch.randn(2 * columns, 32) @ torch.randn(32, columns)
    return torch.randn(out, columns) * 0.02, x.t() @ x / len(x)


def column_loop(weight: Tensor, hessian: Tensor, block: int) -> Tensor:
    """Algorithm 1 of arXiv:2210.17323 in float32; ``block`` columns before the rest of the matrix is updated."""
    weight = weight.clone()
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    scale, zero = GRID.fit(weight)
    assert zero is not None
    scale = scale.float()
    rounded = torch.zeros_like(weight)
    n = weight.shape[1]
    for begin in range(0, n, block):
        end = min(begin + block, n)
        errors = torch.zeros(len(weight), end - begin)
        for j in range(begin, end):
            s, z = scale[:, j // 128], zero[:, j // 128]
            rounded[:, j] = (((weight[:, j] / s).round() + z).clamp(GRID.low, GRID.high) - z) * s
            errors[:, j - begin] = (weight[:, j] - rounded[:, j]) / upper[j, j]
            weight[:, j:end] -= errors[:, j - begin : j - begin + 1] * upper[j, j:end]
        weight[:, end:] -= errors @ upper[begin:end, end:]
    return rounded


def ours(weight: Tensor, hessian: Tensor) -> Tensor:
    quantized = METHOD.quantize(weight, LayerStats(n_tokens=1, hessian=hessian))
    assert isinstance(quantized, QTensor)
    return quantized.dequantize()


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def compare(rounds: int) -> None:
    for out, columns in LAYERS:
        weight, hessian = problem(out, columns)
        calls = {
            "textbook": lambda w=weight, h=hessian: column_loop(w, h, w.shape[1]),
            "published": lambda w=weight, h=hessian: column_loop(w, h, 128),
            "ours": lambda w=weight, h=hessian: ours(w, h),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        results: dict[str, Tensor] = {}
        for _ in range(rounds):
            for name, call in calls.items():
                taken, results[name] = timed(call)
                seconds[name].append(taken)
        factor = statistics.median(timed(lambda h=hessian: inverse_factor(h, DAMPING).upper)[0] for _ in range(rounds))
        base = statistics.median(seconds["ours"])
        print(
            f"{out}x{columns}, {torch.get_num_threads()} threads, {rounds} rounds (factorization alone {factor:.2f} s)"
        )
        for name, result in results.items():
            median = statistics.median(seconds[name])
            error = relative_error(weight, result, hessian)
            differ = (result != results["ours"]).float().mean().item()
            print(
                f"  {name:10} {median:7.2f} s  {median / base:5.2f}x  relative error {error:.6f}  "
                f"values that differ {differ:.2%}"
            )


def growth(rounds: int) -> None:
    """Time of one square layer against its width; what that means for models nobody here can load."""
    points: list[tuple[int, float, float]] = []
    for width in WIDTHS:
        weight, hessian = problem(width, width)
        loop = statistics.median(timed(lambda w=weight, h=hessian: ours(w, h))[0] for _ in range(rounds))
        factor = statistics.median(timed(lambda h=hessian: inverse_factor(h, DAMPING).upper)[0] for _ in range(rounds))
        x = torch.randn(4096, width)
        total = torch.zeros(width, width)
        gather = statistics.median(timed(lambda t=total, x=x: t.addmm_(x.t(), x))[0] for _ in range(rounds)) / 4096
        points.append((width, loop, factor))
        print(
            f"{width:6}  quantize {loop:7.2f} s  of which factorization {factor:6.2f} s  "
            f"Hessian {gather * 1e6:7.2f} us a token"
        )
    (w0, t0, _), (w1, t1, f1) = points[-2:]
    print(f"from {w0} to {w1}: time grows by width^{math.log(t1 / t0) / math.log(w1 / w0):.2f}")
    rest = (t1 - f1) / w1**3  # seconds for each out * in * in
    for name, (linears, blocks) in MODELS.items():
        stages = {columns for _, columns in linears}
        quantize = sum(rest * out * columns**2 for out, columns in linears)
        quantize += sum(f1 * (columns / w1) ** 3 * (3 if columns == min(stages) else 1) for columns in stages)
        text = (
            gather * 128 * 2048 * sum((columns / w1) ** 2 * (3 if columns == min(stages) else 1) for columns in stages)
        )
        hours = blocks * (quantize + text) / 3600
        print(
            f"{name}: about {hours:.1f} hours on this machine, by cubes from width {w1} (of which Hessians of 128 "
            f"windows of 2048 tokens {blocks * text / 3600:.1f}; forward passes not counted); largest Hessian "
            f"{max(stages) ** 2 * 4 / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("layers", "width"), default="layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    (compare if arguments.what == "layers" else growth)(arguments.rounds)
