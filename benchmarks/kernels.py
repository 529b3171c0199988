"""How fast is the packed linear layer on this CPU, beside PyTorch, transformers and llama.cpp?

    python benchmarks/kernels.py                                   # BitNet-2B4T's shapes, one thread and all
    python benchmarks/kernels.py --ggml FOLDER --plot kernels.png  # with llama.cpp's shared libraries
    python benchmarks/kernels.py --shapes 2560x2560 --tokens 1 8 --threads 1

Every figure is the median over rounds; in each round every contender has its turn, so that what else the machine does
falls on all alike. Weights stream from memory: each call takes the next of so many copies that together they exceed the
caches. "read" is what plain reading reaches in the same round, on as many threads (the best of as many passes as fill
a turn), and "of read" the share of it at which a contender moves its weights.

transformers' layer is compiled by torch when a shape is new: it is called twice before anything is timed. It is so slow
that its turn in a round is a single call.

FOLDER holds libggml-base.so and libggml-cpu.so of llama.cpp (in a wheel of llama-cpp-python: ``llama_cpp/lib``). Its
products run as one graph over all copies, so starting threads is not counted against it.
"""

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitnet.ops.build import find_compiler
from bitnet.ops.cpu import choice
from bitnet.ops.int8 import int8_linear
from bitnet.quant.packing import pack

SHAPES = ("2560x2560", "6912x2560", "2560x6912", "13824x2560")  # out x in; the last is gate and up in one
TQ2_0, GGML_BLOCK, GGML_BLOCK_BYTES = 35, 256, 66
READ = r"""
#include <stdint.h>
#include <stddef.h>
// Eight places at once, as processors fetch fastest (on an EPYC one thread reads 16, 21, 28 and 22 GB/s from 1, 4, 8
// and 16; PyTorch's float32 product 25).
uint64_t read_all(const uint64_t *p, size_t n, int threads) {
  uint64_t all = 0;
  size_t part = n / 8 / 8 * 8;
#pragma omp parallel for num_threads(threads) reduction(^ : all)
  for (size_t i = 0; i < part; i += 8)
    for (int place = 0; place < 8; ++place)
      for (int j = 0; j < 8; ++j) all ^= p[place * part + i + j];
  return all;
}
"""


@dataclass
class Contender:
    """One way to compute a layer: ``call(i)`` computes ``calls`` products, with copy i of the weights or with all."""

    name: str
    call: Callable[[int], object]
    copies: int
    weight_bytes: int  # of one copy
    calls: int = 1
    slow: bool = False  # one call is a turn, however short a turn is asked for; compiled in its first calls
    turn: int = 0  # the copy that is next


def copies_for(nbytes: int, stream: int) -> int:
    return max(2, -(-stream // nbytes))


def ours(out: int, columns: int, layout: str, x: Tensor, stream: int) -> Contender:
    codes = torch.randint(-1, 2, (out, columns), dtype=torch.int8)
    first = pack(codes if layout != "b1" else torch.where(codes > 0, 1, -1).to(torch.int8), layout)
    scale = torch.full((1, 1), 0.02)
    weights = [first.clone() for _ in range(copies_for(first.numel(), stream))]
    run = torch.ops.bitnet.packed_linear.default
    return Contender(
        f"packed {layout}", lambda i: run(x, weights[i], scale, None, layout, "absmax"), len(weights), first.numel()
    )


def int8(out: int, columns: int, x: Tensor, stream: int) -> Contender:
    first, scale = pack(torch.randint(-1, 2, (out, columns), dtype=torch.int8), "i2"), torch.full((1, 1), 0.02)
    weights = [first.clone() for _ in range(copies_for(out * columns, stream))]
    return Contender(
        "torch._int_mm", lambda i: int8_linear(x, weights[i], scale, None, "i2", "absmax"), len(weights), out * columns
    )


def dense(out: int, columns: int, x: Tensor, stream: int) -> Contender:
    first = torch.randn(out, columns).to(x.dtype)
    weights = [first.clone() for _ in range(copies_for(first.nbytes, stream))]
    name = f"torch {str(x.dtype).removeprefix('torch.')}"
    return Contender(name, lambda i: torch.nn.functional.linear(x, weights[i]), len(weights), first.nbytes)


def transformers_bitlinear(out: int, columns: int, x: Tensor) -> Contender:
    from transformers.integrations.bitnet import BitLinear

    layer = BitLinear(columns, out, bias=False, dtype=x.dtype)
    layer.weight.copy_(torch.randint(0, 256, layer.weight.shape, dtype=torch.uint8) & 0b10101010)
    layer.weight_scale.fill_(50.0)
    return Contender("transformers BitLinear", lambda i: layer(x), 1, layer.weight.numel(), slow=True)


class GGML:
    """Just enough of ggml's C interface to multiply TQ2_0 matrices by float32 rows, with its own threads."""

    class InitParams(ctypes.Structure):
        _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

    def __init__(self, folder: str) -> None:
        self.base = ctypes.CDLL(str(Path(folder) / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(Path(folder) / "libggml-cpu.so"))
        self.cpu.ggml_cpu_init()
        for name in ("init", "new_tensor_2d", "get_data", "mul_mat", "new_graph_custom"):
            getattr(self.base, f"ggml_{name}").restype = ctypes.c_void_p
        self.base.ggml_init.argtypes = [self.InitParams]

    def contender(self, out: int, columns: int, x: Tensor, stream: int, threads: int) -> Contender:
        nbytes = out * columns // GGML_BLOCK * GGML_BLOCK_BYTES
        copies = copies_for(nbytes, stream)
        size = copies * (nbytes + (x.shape[0] * (out + columns) * 8) + 4096) + (64 << 20)
        context = ctypes.c_void_p(self.base.ggml_init(self.InitParams(size, None, False)))
        long, pointer = ctypes.c_int64, ctypes.c_void_p
        graph = pointer(
            self.base.ggml_new_graph_custom(context, ctypes.c_size_t(2 * copies + 16), ctypes.c_bool(False))
        )
        inputs = pointer(self.base.ggml_new_tensor_2d(context, 0, long(columns), long(x.shape[0])))
        rows = x.float().contiguous()
        ctypes.memmove(self.base.ggml_get_data(inputs), rows.data_ptr(), rows.nbytes)
        blocks = torch.randint(0, 256, (out * columns // GGML_BLOCK, GGML_BLOCK_BYTES), dtype=torch.uint8) & 0b10101010
        blocks[:, -2:] = torch.tensor([0.02], dtype=torch.float16).view(torch.uint8)
        for _ in range(copies):
            weight = pointer(self.base.ggml_new_tensor_2d(context, TQ2_0, long(columns), long(out)))
            ctypes.memmove(self.base.ggml_get_data(weight), blocks.data_ptr(), nbytes)
            self.base.ggml_build_forward_expand(graph, pointer(self.base.ggml_mul_mat(context, weight, inputs)))

        def call(_: int) -> None:
            assert self.cpu.ggml_graph_compute_with_ctx(context, graph, threads) == 0

        call.free = lambda: self.base.ggml_free(context)  # type: ignore[attr-defined]
        return Contender("llama.cpp TQ2_0", call, 1, nbytes, calls=copies)


def reader() -> Callable[[Tensor, int], None]:
    """A function that reads a tensor with so many threads."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.cpp", Path(folder) / "read.so"
        source.write_text(READ.replace("uint64_t read_all", 'extern "C" uint64_t read_all'))
        flags = ["-O3", "-fopenmp", "-shared", "-fPIC", *(["-mavx2"] if platform.machine() == "x86_64" else [])]
        subprocess.run([*find_compiler(), *flags, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).read_all
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_uint64
    return lambda tensor, threads: function(tensor.data_ptr(), tensor.nbytes // 8, threads)


def seconds_of(contender: Contender, least: float, clock: Callable[[], float]) -> float:
    """Seconds a product, over as many calls as take ``least`` seconds."""
    count, began = 0, clock()
    while True:
        contender.call(contender.turn)
        contender.turn = (contender.turn + 1) % contender.copies
        count += 1
        spent = clock() - began
        if contender.slow or spent >= least:
            return spent / (count * contender.calls)


def measure(
    contenders: list[Contender], read: Callable[[], int], clock: Callable[[], float], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds a product in every round, and under "read" bytes a second; ``read`` tells how many bytes it has read."""
    found: dict[str, list[float]] = {each.name: [] for each in contenders} | {"read": []}
    for each in contenders:
        for i in range(2 * each.copies if each.slow else each.copies):
            each.call(i % each.copies)  # what is made, checked or compiled once for each weight is
    for _ in range(options.rounds):
        found["read"].append(speed_of(read, options.seconds, clock))
        for each in contenders:
            found[each.name].append(seconds_of(each, options.seconds, clock))
    return found


def speed_of(read: Callable[[], int], least: float, clock: Callable[[], float]) -> float:
    """Bytes a second of the best of as many passes as take ``least`` seconds: a bound must not be an unlucky pass."""
    began, best = clock(), 0.0
    while True:
        start = clock()
        best = max(best, read() / (clock() - start))
        if clock() - began >= least:
            return best


def contenders_for(out: int, columns: int, tokens: int, threads: int, options: argparse.Namespace, ggml: GGML | None):
    stream = options.megabytes << 20
    x = torch.randn(tokens, columns, dtype=torch.bfloat16)
    made = [ours(out, columns, layout, x, stream) for layout in options.layouts]
    made += [dense(out, columns, x, stream), dense(out, columns, x.float(), stream), int8(out, columns, x, stream)]
    if options.transformers and tokens <= 8:
        made.append(transformers_bitlinear(out, columns, x))
    if ggml is not None:
        made.append(ggml.contender(out, columns, x, stream, threads))
    return made


def plot(rows: list[dict], path: str, title: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from bitnet.report.plots import COLOURS

    shapes, threads = list(dict.fromkeys(row["shape"] for row in rows)), rows[0]["threads"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(3.2 * len(shapes) + 1.6, 3.6), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for colour, name in zip(COLOURS, names, strict=False):
            mine = [row for row in rows if (row["shape"], row["name"], row["threads"]) == (shape, name, threads)]
            axis.plot([row["tokens"] for row in mine], [row["gmacs"] for row in mine], "o-", color=colour, label=name)
        axis.set(xscale="log", yscale="log", title=shape, xlabel="tokens at once")
        axis.set_xticks(sorted({row["tokens"] for row in rows}), sorted({row["tokens"] for row in rows}))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"billion products a second, {threads} thread{'s' if threads > 1 else ''}")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, torch {torch.__version__}, packed layers on {choice().name}"


@torch.inference_mode()
def compare(options: argparse.Namespace) -> list[dict]:
    """Measure and print everything; a row for each shape, number of tokens, number of threads and contender."""
    read_all, ggml = reader(), None if options.ggml is None else GGML(options.ggml)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    memory = torch.ones(options.megabytes << 17, dtype=torch.int64)
    rows = list[dict]()
    for threads in options.threads:
        torch.set_num_threads(threads)
        for shape in options.shapes:
            out, columns = map(int, shape.split("x"))
            for tokens in options.tokens:
                with torch.inference_mode(False), torch.no_grad():
                    contenders = contenders_for(out, columns, tokens, threads, options, ggml)

                def read(threads: int = threads) -> int:
                    read_all(memory, threads)
                    return memory.nbytes

                found = measure(contenders, read, clock, options)
                ours_seconds = found[contenders[0].name]
                speed = statistics.median(found["read"]) / 1e9
                print(f"\n{shape}, {tokens} tokens, {threads} threads; read {speed:.1f} GB/s")
                for each in contenders:
                    seconds = statistics.median(found[each.name])
                    # ratios within a round, then their median: noise that falls on a whole round cancels
                    ratio = statistics.median(a / b for a, b in zip(found[each.name], ours_seconds, strict=False))
                    share = statistics.median(
                        each.weight_bytes / a / b for a, b in zip(found[each.name], found["read"], strict=False)
                    )
                    gmacs = tokens * out * columns / seconds / 1e9
                    rows.append(
                        {
                            **{"shape": shape, "tokens": tokens, "threads": threads, "name": each.name},
                            **{"seconds": seconds, "ratio": ratio, "of_read": share, "gmacs": gmacs},
                        }
                    )
                    print(
                        f"  {each.name:24}{seconds * 1e6:10.0f} us{gmacs:8.1f} Gmac/s{share:8.0%} of read"
                        f"{ratio:9.2f} x {contenders[0].name}",
                        flush=True,
                    )
                    getattr(each.call, "free", lambda: None)()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="out x in")
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 8, 32, 128), help="rows of inputs at once")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--layouts", nargs="+", default=("i2",), choices=("i2", "t5", "b1"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.1, help="least time of a contender's turn in a round")
    parser.add_argument("--megabytes", type=int, default=128, help="weights to stream through: several times the cache")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for one thread on a busy machine"
    )
    parser.add_argument("--transformers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ggml", metavar="FOLDER", help="folder of llama.cpp's shared libraries")
    parser.add_argument("--plot", metavar="FILE", help="picture to write")
    parser.add_argument("--json", metavar="FILE", help="figures to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(machine())
    rows = compare(options)
    if options.plot:
        plot(rows, options.plot, machine())
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
