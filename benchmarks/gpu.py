"""Everything about packed layers that waits for a GPU, in one command and under ten minutes: are they right, how fast?

    python benchmarks/gpu.py                        # checks, then times; prints Markdown
    python benchmarks/gpu.py --out gpu.md           # and writes it to a file
    python benchmarks/gpu.py --rehearse             # a small run on the CPU: that this script works
    python benchmarks/gpu.py --roofline             # no GPU needed: what the bytes allow on known ones
    python -m bitnet.ops.cuda.census                # no GPU needed: what the machine code says

Checks: every kernel, dtype and shape bit for bit against the reference on the CPU; NaN and infinity; a CUDA graph;
another stream; no synchronization in a call; torch.compile. One that fails is a line of the report, and exit code 1.
Times: the operator (quantizing the inputs included) and the multiplication alone, beside bfloat16 `linear` and
`torch._int_mm`, on the shapes of BitNet-2B4T. Calls go through as many copies of the weight as it takes to leave the
cache, inside one CUDA graph, all candidates in turn round after round; printed are medians. Fractions of bandwidth are
of what a copy reads and writes on the same device in the same run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitnet.ops import cuda, packed_linear
from bitnet.ops.cuda import dispatch
from bitnet.ops.cuda.plan import MULTIPLICATIONS, launches
from bitnet.ops.packed_linear import reference_linear
from bitnet.quant import pack

SHAPES = ((2560, 2560), (6912, 2560), (2560, 6912), (13824, 2560))  # out, in
TOKENS = (1, 8, 16, 32, 128, 512, 2048)
STREAMED = 256 << 20  # bytes that a candidate's weights take together: several times the cache of any device
ROUNDS = 7
NOT_HERE = "not run: needs a GPU"
# Bytes a second of memory, and pairs of a multiplication and an addition a second of dense int8 tensor cores.
DEVICES = {
    "A100 80 GB": (2039e9, 312e12),
    "H100 SXM": (3350e9, 989.5e12),
    "RTX 4090": (1008e9, 330.3e12),
}
Call = Callable[[], object]


@dataclass(frozen=True)
class Layer:
    packed: Tensor
    scale: Tensor
    bias: Tensor | None = None


def layer(out: int, columns: int, device: torch.device, bias: bool = False) -> Layer:
    draw = torch.Generator().manual_seed(out + columns)
    codes = torch.randint(-1, 2, (out, columns), generator=draw, dtype=torch.int8)
    scale, offset = torch.rand(out, 1, generator=draw) + 0.01, torch.randn(out, generator=draw)
    return Layer(pack(codes, "i2").to(device), scale.to(device), offset.to(device) if bias else None)


# ---- Checks ----------------------------------------------------------------------------------------------------


def equal(found: Tensor, right: Tensor) -> bool:
    """Same bits; a NaN equals a NaN."""
    found = found.cpu()
    return torch.equal(found.isnan(), right.isnan()) and torch.equal(found.nan_to_num(), right.nan_to_num())


def wrong_cases(device: torch.device, small: bool) -> list[str]:
    """Every case whose bits are not the reference's."""
    shapes = (
        [(1, 1), (17, 129), (130, 512)] if small else [(1, 1), (1, 700), (17, 1), (129, 300), (2560, 2560), (640, 6912)]
    )
    wrong = []
    for out, columns in shapes:
        for tokens in (1, 3, 20) if small else (*range(1, 18), 64, 65, 257):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for activation in ("absmax", "absmax_b1"):
                    this = layer(out, columns, device, bias=tokens % 2 == 0)
                    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
                    if tokens > 2:
                        x[0, 0], x[1, columns // 2] = torch.nan, torch.inf
                    cpu = [None if each is None else each.cpu() for each in (this.packed, this.scale, this.bias)]
                    right = reference_linear(x, *cpu, "i2", activation)
                    found = packed_linear(x.to(device), this.packed, this.scale, this.bias, "i2", activation)
                    if not equal(found, right):
                        wrong.append(f"{tokens} x {columns} -> {out}, {dtype}, {activation}")
    return wrong


def check_bits(device: torch.device, small: bool) -> str:
    wrong = wrong_cases(device, small)
    return f"{len(wrong)} cases differ, first: {wrong[0]}" if wrong else ""


def check_kernels(device: torch.device, small: bool) -> str:
    if device.type != "cuda":
        return NOT_HERE
    return dispatch.fault_on(device.index) or ""


def check_graph(device: torch.device, small: bool) -> str:
    """A captured call gives the bits of a direct one, for new inputs, too."""
    if device.type != "cuda":
        return NOT_HERE
    for tokens in (1, 16, 300):
        this, x = layer(2560, 2560, device), torch.randn(tokens, 2560, device=device, dtype=torch.bfloat16)
        cuda.prepare(this.packed, "i2", 2560)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = packed_linear(x, this.packed, this.scale, None, "i2")
        x.copy_(torch.randn_like(x))
        graph.replay()
        if not torch.equal(y, packed_linear(x, this.packed, this.scale, None, "i2")):
            return f"{tokens} tokens: the graph answers differently"
    return ""


def check_stream(device: torch.device, small: bool) -> str:
    """A call runs on the current stream: behind what was queued there, and on no other."""
    if device.type != "cuda":
        return NOT_HERE
    this, stream = layer(2560, 2560, device), torch.cuda.Stream(device)
    x = torch.randn(4, 2560, device=device)
    right = packed_linear(x, this.packed, this.scale, None, "i2")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = packed_linear(late, this.packed, this.scale, None, "i2")
    stream.synchronize()
    return "" if torch.equal(found, right) else "the call did not wait for its inputs"


def check_no_wait(device: torch.device, small: bool) -> str:
    if device.type != "cuda":
        return NOT_HERE
    this, x = layer(2560, 2560, device), torch.randn(4, 2560, device=device)
    packed_linear(x, this.packed, this.scale, None, "i2")
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_linear(x, this.packed, this.scale, None, "i2")
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def check_compiled(device: torch.device, small: bool) -> str:
    this, x = layer(256, 300, device), torch.randn(4, 300, device=device)
    arguments = (x, this.packed, this.scale, None, "i2", "absmax")
    compiled = torch.compile(packed_linear, fullgraph=True, backend="eager" if small else "inductor")
    return "" if torch.equal(compiled(*arguments), packed_linear(*arguments)) else "compiled bits differ"


CHECKS = {
    "kernels run, and equal the reference": check_kernels,
    "bits of the operator, all dtypes and shapes": check_bits,
    "CUDA graph": check_graph,
    "current stream": check_stream,
    "no synchronization": check_no_wait,
    "torch.compile(fullgraph=True)": check_compiled,
}


def checked(device: torch.device, small: bool) -> tuple[list[str], bool]:
    """A line for each check, and whether none failed. A check answers what is wrong: nothing, where all is well."""
    lines, passed = ["| check | result | seconds |", "|---|---|---|"], True
    for name, check in CHECKS.items():
        started = time.perf_counter()
        try:
            fault = check(device, small)
        except Exception as error:  # the next check may still tell something
            fault = f"{type(error).__name__}: {error}"
        passed &= fault in ("", NOT_HERE)
        lines.append(f"| {name} | {fault or 'passed'} | {time.perf_counter() - started:.1f} |")
    return lines, passed


# ---- Times -----------------------------------------------------------------------------------------------------


def captured(calls: list[Call], device: torch.device) -> Call:
    """All calls as one; in a CUDA graph on a GPU."""
    for each in calls[:2]:
        each()
    if device.type != "cuda":
        return lambda: [each() for each in calls]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in calls:
            each()
    return graph.replay


def microseconds(call: Call, calls: int, device: torch.device) -> float:
    """Of one of the calls that ``call`` makes."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e6 / calls
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e3 / calls


def medians(candidates: dict[str, list[Call]], device: torch.device) -> dict[str, float]:
    """Microseconds a call, all candidates in turn, round after round."""
    ready = {name: (captured(calls, device), len(calls)) for name, calls in candidates.items()}
    for call, _ in ready.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(ROUNDS):
        for name, (call, calls) in ready.items():
            times[name].append(microseconds(call, calls, device))
    return {name: statistics.median(each) for name, each in times.items()}


def copies(tensor: Tensor, streamed: int) -> list[Tensor]:
    return [tensor.clone() for _ in range(max(2, -(-streamed // (tensor.numel() * tensor.element_size()))))]


def candidates_for(out: int, columns: int, tokens: int, device: torch.device, streamed: int) -> dict[str, list[Call]]:
    this = layer(out, columns, device)
    x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
    ours = copies(this.packed, streamed)
    if device.type == "cuda":
        for each in ours:
            cuda.prepare(each, "i2", columns)
    dense = copies(torch.randn(out, columns, device=device, dtype=torch.bfloat16), streamed)
    found: dict[str, list[Call]] = {
        "ours": [lambda w=w: packed_linear(x, w, this.scale, None, "i2") for w in ours],
        "bf16": [lambda w=w: torch.nn.functional.linear(x, w) for w in dense],
    }
    if device.type == "cuda":
        y = torch.empty(tokens, out, device=device, dtype=torch.bfloat16)
        plan = [product(x, w, this, y) for w in ours]
        found["product"] = [lambda each=each: dispatch.run([each], device) for each in plan]
    if tokens > 16:  # torch._int_mm takes no fewer
        codes = torch.randint(-127, 128, (tokens, columns), device=device, dtype=torch.int8)
        whole = copies(torch.ones(out, columns, device=device, dtype=torch.int8), streamed)
        found["int8"] = [lambda w=w: torch._int_mm(codes, w.t()) for w in whole]
    return found


def product(x: Tensor, packed: Tensor, this: Layer, y: Tensor, kernel: str | None = None) -> dispatch.Launch:
    """The launch that multiplies, its inputs quantized."""
    weight = dispatch.prepacked(packed, "i2", x.shape[1])
    quantize, multiply = launches(x, weight, this.scale, None, y, "absmax", dispatch.multiprocessors(x.device), kernel)
    dispatch.run([quantize], x.device)
    return multiply


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    call = captured([lambda: target.copy_(source)], device)
    call()
    return 2 * size / (statistics.median(microseconds(call, 1, device) for _ in range(ROUNDS)) * 1e-6)


def traffic(out: int, columns: int, tokens: int) -> int:
    """Bytes that a call must move: weights of two bits, scales, inputs and outputs of 16 bits."""
    return out * columns // 4 + 4 * out + 2 * tokens * (columns + out)


def timed(
    device: torch.device, shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...], streamed: int
) -> list[str]:
    speed = bandwidth(device, streamed)
    lines = [f"A copy moves {speed / 1e9:.0f} GB/s here.", ""]
    lines += ["| out x in | tokens | op, µs | product, µs | bandwidth | TOP/s | bf16, µs | bf16/op | int8/op |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for out, columns in shapes:
        for count in tokens:
            found = medians(candidates_for(out, columns, count, device, streamed), device)
            alone = found.get("product", found["ours"])
            share = traffic(out, columns, count) / (alone * 1e-6) / speed
            rate = 2 * out * columns * count / (alone * 1e-6) / 1e12
            int8 = f"{found['int8'] / found['ours']:.2f}" if "int8" in found else ""
            lines.append(
                f"| {out} x {columns} | {count} | {found['ours']:.1f} | {alone:.1f} | {share:.0%} | {rate:.1f} | "
                f"{found['bf16']:.1f} | {found['bf16'] / found['ours']:.2f} | {int8} |"
            )
    return lines


def thresholds(device: torch.device, shapes: tuple[tuple[int, int], ...], streamed: int) -> list[str]:
    """Every kernel at every number of tokens: where `bitnet.ops.cuda.plan` should change from one to the next."""
    lines = [
        f"| out x in | tokens | {' | '.join(MULTIPLICATIONS)} | chosen |",
        f"|---|---|{'---|' * len(MULTIPLICATIONS)}---|",
    ]
    for out, columns in shapes:
        this = layer(out, columns, device)
        ours = copies(this.packed, streamed)
        for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
            y = torch.empty(tokens, out, device=device, dtype=torch.bfloat16)
            candidates: dict[str, list[Call]] = {}
            for kernel in MULTIPLICATIONS:
                plan = [product(x, w, this, y, kernel) for w in ours]
                candidates[kernel] = [lambda each=each: dispatch.run([each], device) for each in plan]
            chosen = product(x, ours[0], this, y).kernel
            found = medians(candidates, device)
            lines.append(
                f"| {out} x {columns} | {tokens} | {' | '.join(f'{each:.1f}' for each in found.values())} | {chosen} |"
            )
    return lines


# ---- Without a GPU ---------------------------------------------------------------------------------------------


def roofline() -> list[str]:
    """Microseconds that bytes alone take, for one token, and from how many tokens on arithmetic takes longer."""
    shapes = " | ".join(f"{out} x {columns}" for out, columns in SHAPES)
    lines = [f"| device | {shapes} | the last one in bf16 | arithmetic rules from |"]
    lines.append("|---|" + "---|" * (len(SHAPES) + 2))
    for name, (speed, products) in DEVICES.items():
        times = [f"{traffic(out, columns, 1) / speed * 1e6:.2f} µs" for out, columns in SHAPES]
        out, columns = SHAPES[-1]
        dense = (2 * out * columns + 2 * (out + columns)) / speed * 1e6
        balance = next(m for m in range(1, 4096) if out * columns * m / products > traffic(out, columns, m) / speed)
        lines.append(f"| {name} | {' | '.join(times)} | {dense:.2f} µs | {balance} tokens |")
    return lines


def report(device: torch.device, rehearse: bool) -> tuple[list[str], bool]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, a rehearsal"
    lines = [f"# Packed layers on {name}", "", f"torch {torch.__version__}, CUDA {torch.version.cuda}", ""]
    found, passed = checked(device, rehearse)
    lines += [*found, ""]
    shapes, tokens, streamed = (((64, 128),), (1, 20), 1 << 14) if rehearse else (SHAPES, TOKENS, STREAMED)
    lines += timed(device, shapes, tokens, streamed)
    if device.type == "cuda":
        lines += ["", *thresholds(device, SHAPES[:1] + SHAPES[-1:], STREAMED)]
    return lines, passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="a small run on the CPU")
    parser.add_argument("--roofline", action="store_true", help="what the bytes allow on known devices; no GPU needed")
    parser.add_argument("--out", type=Path, help="file for the report, too")
    options = parser.parse_args()
    if options.roofline:
        print("\n".join(roofline()))
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device: --rehearse runs a little of it on the CPU, --roofline needs none", file=sys.stderr)
        return 2
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", torch.cuda.current_device())
    started = time.perf_counter()
    lines, passed = report(device, options.rehearse)
    lines += [
        "",
        f"{'All checks passed' if passed else 'A CHECK FAILED'}; {time.perf_counter() - started:.0f} s in all.",
    ]
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
