"""Is a packed layer on a GPU right? A check answers what is wrong: nothing, where all is well (`benchmarks/gpu.py`)."""

import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.generation import CachedModel
from bitnet.models import Size, from_scratch
from bitnet.nn import BitLinear158, convert, freeze
from bitnet.nn import pack as pack_layers
from bitnet.ops import cuda, packed_linear
from bitnet.ops.cuda import dispatch
from bitnet.ops.packed_linear import reference_linear
from bitnet.quant import pack

NOT_HERE = "not run: needs a GPU"


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
        layers = [layer(out, columns, device, bias) for bias in (False, True)]
        for tokens in (1, 3, 20) if small else (*range(1, 18), 64, 65, 257):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for activation in ("absmax", "absmax_b1"):
                    this = layers[tokens % 2 == 0]
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


def check_thread(device: torch.device, small: bool) -> str:
    """A new thread has no context of the driver."""
    this, x, found = layer(128, 300, device), torch.randn(3, 300, device=device), []
    right = packed_linear(x, this.packed, this.scale, None, "i2")
    thread = threading.Thread(target=lambda: found.append(packed_linear(x, this.packed, this.scale, None, "i2")))
    thread.start()
    thread.join()
    return "" if found and torch.equal(found[0], right) else "a new thread answers differently, or not at all"


def check_layer(device: torch.device, small: bool) -> str:
    """The trained layer, the frozen and the packed one answer the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in ((64, 96), (33, 700)):
            trained = BitLinear158(columns, rows, device=device)
            torch.nn.init.normal_(trained.weight, std=0.02)
            x = torch.randn(5, columns, device=device, dtype=dtype)
            with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16), torch.no_grad():
                frozen = trained.freeze()
                answers = [each(x) for each in (trained, frozen, frozen.pack())]
            for name, each in zip(("frozen", "packed"), answers[1:], strict=True):
                if not torch.equal(each, answers[0]):
                    return f"{name} differs from trained: {rows} x {columns}, {dtype}"
    return ""


def check_training(device: torch.device, small: bool) -> str:
    """A training step of a layer waits for nothing."""
    if device.type != "cuda":
        return NOT_HERE
    trained, x = BitLinear158(256, 128, device=device), torch.randn(32, 256, device=device)
    trained(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained(x).sum().backward()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def check_generation(device: torch.device, small: bool) -> str:
    """Logits of replayed steps are those of launched ones, but for codes that the order of attention's sums moves."""
    if device.type != "cuda":
        return NOT_HERE
    size = Size(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
    model = from_scratch(body="bitnet", size=size, vocab_size=300, hidden_act="relu2").eval()
    convert(model)
    freeze(model)
    pack_layers(model)
    model.to(device)
    ids = torch.randint(300, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = []
    for graph in (True, False):
        cached = CachedModel(model, graph=graph)
        cached.read(ids[:50])
        logits.append(torch.stack([cached.read([each]) for each in ids[50:]]).float())
    share = float((logits[0] - logits[1]).std() / logits[1].std())
    return "" if share < 0.01 else f"replayed logits differ by {share:.3f} of their spread"


CHECKS = {
    "kernels run, and equal the reference": check_kernels,
    "bits of the operator, all dtypes and shapes": check_bits,
    "CUDA graph": check_graph,
    "current stream": check_stream,
    "a new thread": check_thread,
    "no synchronization": check_no_wait,
    "torch.compile(fullgraph=True)": check_compiled,
    "trained, frozen and packed layers agree": check_layer,
    "no synchronization in training": check_training,
    "generation from a CUDA graph": check_generation,
}


def checked(name: str, device: torch.device, small: bool) -> tuple[str, bool]:
    """The line of a check in the report, and whether it did not fail."""
    started = time.perf_counter()
    try:
        fault = CHECKS[name](device, small)
    except Exception as error:  # the next check may still tell something
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
    line = f"| {name} | {fault or 'passed'} | {time.perf_counter() - started:.1f} |"
    return line, fault in ("", NOT_HERE)
