"""How fast is a packed layer on a GPU? Tables for `benchmarks/gpu.py`, which says how they are measured."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from gpu_checks import Layer, layer
from torch import Tensor

from bitnet.generation import CachedModel
from bitnet.models import Size, from_scratch
from bitnet.nn import convert, freeze
from bitnet.nn import pack as pack_layers
from bitnet.ops import cuda, packed_linear
from bitnet.ops.cuda import dispatch
from bitnet.ops.cuda.plan import MULTIPLICATIONS, launches

SHAPES = ((2560, 2560), (6912, 2560), (2560, 6912), (13824, 2560))  # out, in
TOKENS = (1, 8, 16, 32, 128, 512, 2048)
STREAMED = 256 << 20  # bytes that a candidate's weights take together: several times the cache of any device
ROUNDS = 7
SIZES = Path(__file__).parents[1] / "conf" / "size"
TIMED = [
    "| out x in | tokens | op, µs | product, µs | bandwidth | TOP/s | bf16, µs | bf16/op | int8/op |",
    "|---|---|---|---|---|---|---|---|---|",
]
THRESHOLDS = [  # every kernel at every number of tokens: where bitnet.ops.cuda.plan should change from one to the next
    f"| out x in, µs | tokens | {' | '.join(MULTIPLICATIONS)} | chosen |",
    f"|---|---|{'---|' * len(MULTIPLICATIONS)}---|",
]
GENERATION = ["| size | form | step | ms a token | tokens/s |", "|---|---|---|---|---|"]
MEMORY = ["| out x in | stored, MB | in the kernels' order, MB | at most while made, MB |", "|---|---|---|---|"]
# Bytes a second of memory, and pairs of a multiplication and an addition a second of dense int8 tensor cores.
DEVICES = {
    "A100 80 GB": (2039e9, 312e12),
    "H100 SXM": (3350e9, 989.5e12),
    "RTX 4090": (1008e9, 330.3e12),
}
Call = Callable[[], object]


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


def timed(out: int, columns: int, device: torch.device, tokens: tuple[int, ...], streamed: int) -> list[str]:
    """Rows of a shape under `TIMED`."""
    speed, lines = bandwidth(device, streamed), []
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


def thresholds(out: int, columns: int, device: torch.device, streamed: int) -> list[str]:
    """Rows of a shape under `THRESHOLDS`."""
    this, lines = layer(out, columns, device), []
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


def memory(out: int, columns: int, device: torch.device) -> str:
    """What a weight takes on the device: as stored, in the kernels' order beside it, and at most while that is made."""
    this = layer(out, columns, device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    cuda.prepare(this.packed, "i2", columns)
    kept, most = (each(device) - before for each in (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated))
    sizes = " | ".join(f"{each / 1e6:.2f}" for each in (this.packed.numel(), kept, most))
    return f"| {out} x {columns} | {sizes} |"


def generation(form: str, graph: bool, device: torch.device, size: str, tokens: int) -> str:
    """The row of a model under `GENERATION`: milliseconds from a token's id to the logits of the next, its median."""
    shape = yaml.safe_load((SIZES / f"{size}.yaml").read_text())
    shape.pop("_target_")
    torch.manual_seed(0)
    model = from_scratch(body="bitnet", size=Size(**shape), vocab_size=32000, hidden_act="relu2").eval()
    if form == "packed":
        convert(model)
        freeze(model)
        pack_layers(model)
    model.to(device, torch.bfloat16)
    cached, seconds = CachedModel(model, graph=graph), list[float]()
    cached.read(list(range(64)))
    for each in range(tokens):
        started = time.perf_counter()
        cached.read([each]).cpu()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return f"| {size} | {form} | {'replayed' if graph else 'launched'} | {median * 1e3:.3f} | {1 / median:.1f} |"


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
