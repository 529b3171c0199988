"""How fast is GPTQ here, beside the loops that its paper and its published code have, and how does it grow?

    python benchmarks/gptq.py                    # 2048x2048 and 2048x5632, at equal results
    python benchmarks/gptq.py --what width       # time of one layer against its width, extrapolated to 7B and 70B
    python benchmarks/gptq.py --what depth       # time and peak memory of a whole model against its number of blocks
    python benchmarks/gptq.py --what growth --plot gptq.png
    python benchmarks/gptq.py --threads 1

All loops get the same weight, Hessian and 4-bit grid (groups of 128, fitted beforehand) and are timed in turn in one
process, round after round; printed are medians, ratios, and how much the results differ. ``textbook`` updates the whole
rest of the matrix after each column (algorithm 1 without its blocks; timed once); ``published`` is the lazy batch of
algorithm 1: blocks of 128 columns, column by column inside a block, on the weight as it lies [out, in].
"""

import argparse
import dataclasses
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bitnet.models import Size, from_scratch
from bitnet.ptq import GPTQ, LayerStats, quantize
from bitnet.ptq.hessian import inverse_factor, relative_error
from bitnet.quant import QTensor
from bitnet.quant.grid import Grid

LAYERS = ((2048, 2048), (2048, 5632))
WIDTHS = (512, 1024, 2048, 4096)
DEPTHS = (2, 4, 8)
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
        for number in range(rounds):
            for name, call in calls.items():
                if name == "textbook" and number:
                    continue  # minutes at the larger size: once is enough for its order of magnitude
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


def growth(rounds: int) -> list[tuple[float, float]]:
    """Time of one square layer against its width; what that means for models nobody here can load."""
    points: list[tuple[int, float, float]] = []
    gather = 0.0
    for width in WIDTHS:
        weight, hessian = problem(width, width)
        loop = statistics.median(timed(lambda w=weight, h=hessian: ours(w, h))[0] for _ in range(rounds))
        factor = statistics.median(timed(lambda h=hessian: inverse_factor(h, DAMPING).upper)[0] for _ in range(rounds))
        x, total = torch.randn(4096, width), torch.zeros(width, width)
        gather = statistics.median(timed(lambda t=total, x=x: t.addmm_(x.t(), x))[0] for _ in range(rounds)) / len(x)
        points.append((width, loop, factor))
        print(
            f"{width:6}  quantize {loop:7.2f} s, of which factorization {factor:6.2f} s; "
            f"Hessian {gather * 1e6:7.2f} us a token"
        )
    (w0, t0, _), (w1, t1, f1) = points[-2:]
    print(f"from {w0} to {w1}: time grows by width^{math.log(t1 / t0) / math.log(w1 / w0):.2f}")
    rest = (t1 - f1) / w1**3  # seconds for each out * in * in
    for name, (linears, blocks) in MODELS.items():
        stages = sorted({columns for _, columns in linears})  # three stages of the narrow inputs, one of the wide
        times = {columns: 3 if columns == stages[0] else 1 for columns in stages}
        quantize = sum(rest * out * columns**2 for out, columns in linears)
        quantize += sum(f1 * (columns / w1) ** 3 * count for columns, count in times.items())
        text = gather * 128 * 2048 * sum((columns / w1) ** 2 * count for columns, count in times.items())
        print(
            f"{name}, on paper: {blocks * (quantize + text) / 3600:.1f} hours on this machine, of which Hessians of "
            f"128 windows of 2048 tokens {blocks * text / 3600:.1f}, by cubes (squares) from width {w1}; forward "
            f"passes not counted; largest Hessian {stages[-1] ** 2 * 4 / 1e9:.2f} GB"
        )
    return [(width, loop) for width, loop, _ in points]


def depth() -> list[tuple[float, float]]:
    """A whole model, in a process of its own for each number of blocks, because peak memory is one of a process."""
    points = []
    for blocks in DEPTHS:
        command = [sys.executable, __file__, "--what", "one-depth", "--blocks", str(blocks)]
        command += ["--threads", str(torch.get_num_threads())]
        seconds, peak, model, block, hessian = map(float, subprocess.check_output(command, text=True).split())
        points.append((blocks, seconds))
        print(
            f"{blocks:3} blocks: {seconds:6.1f} s; peak memory {peak:6.0f} MB above the program, the model's "
            f"{model:.0f} MB included: model + block ({block:.0f} MB) + {(peak - model - block) / hessian:.1f} "
            f"Hessians ({hessian:.0f} MB)"
        )
    return points


def one_depth(blocks: int) -> None:
    """Seconds, and MB of: peak above the program, model, one block, the largest Hessian."""
    width, feed_forward = 1024, 2816
    size = Size(
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    from_scratch(body="llama", hidden_act="silu", size=dataclasses.replace(size, num_hidden_layers=1), vocab_size=64)
    before = resident("VmRSS")
    model = from_scratch(body="llama", hidden_act="silu", size=size, vocab_size=64)
    of_block = sum(parameter.numel() for parameter in model.model.layers[0].parameters()) * 4 / 1e6
    of_model = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6
    began = time.perf_counter()
    quantize(model, GPTQ(), torch.randint(0, 64, (8, 256)))
    taken = time.perf_counter() - began
    print(taken, resident("VmHWM") - before, of_model, of_block, 4 * feed_forward**2 / 1e6)


def resident(figure: str) -> float:
    """MB of this process's memory: VmRSS now, VmHWM at its peak (Linux)."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(figure)) / 1e3


def draw(path: str, by_width: list[tuple[float, float]], by_depth: list[tuple[float, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    left.loglog(*zip(*by_width, strict=True), "o-", color="#0072B2")
    left.set(title="one square layer", xlabel="width", ylabel="seconds")
    left.set_xticks([width for width, _ in by_width], [str(int(width)) for width, _ in by_width])
    left.minorticks_off()
    right.plot(*zip(*by_depth, strict=True), "o-", color="#D55E00")
    right.set(title="a model of width 1024", xlabel="blocks", ylabel="seconds", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("layers", "width", "depth", "growth", "one-depth"), default="layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--blocks", type=int, default=2, help="of one-depth, which depth calls")
    parser.add_argument("--plot", help="file for a picture of --what growth")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "one-depth":
        one_depth(arguments.blocks)
    if arguments.what == "layers":
        compare(arguments.rounds)
    by_width = growth(arguments.rounds) if arguments.what in ("width", "growth") else []
    by_depth = depth() if arguments.what in ("depth", "growth") else []
    if arguments.plot and by_width and by_depth:
        draw(arguments.plot, by_width, by_depth)
