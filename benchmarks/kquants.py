"""How do the k-quants here compare with ggml's own, in error and in time?

    python benchmarks/kquants.py --library libggmlquants.so
    python benchmarks/kquants.py --library libggmlquants.so --model FOLDER --text FILE   # a real model and its inputs

Every type is quantized by ggml (without and with an importance matrix), by `KQuant` alike, and by `KQuant` with error
feedback. Printed are means over the matrices of the relative squared error, and of the error weighted by the inputs'
second moments (relH); seconds are CPU time of one thread for all matrices; ratios are to ggml's line above.
Without --model: four normal matrices of 512 x 1024 whose inputs are correlated. Without --library: only this project's.

The library is ggml's C source, which the source distribution of llama-cpp-python holds; it needs three functions more::

    pip download llama-cpp-python --no-deps --no-binary llama-cpp-python   # and unpack; cd .../vendor/llama.cpp/ggml
    cat > stub.c <<'C'
    #include <stdlib.h>
    #include "ggml.h"
    void ggml_abort(const char * f, int l, const char * m, ...) { abort(); }
    const char * ggml_type_name(enum ggml_type t) { return ""; }
    size_t ggml_type_size(enum ggml_type t) { switch (t) {
        case GGML_TYPE_Q2_K: return 84; case GGML_TYPE_Q3_K: return 110; case GGML_TYPE_Q4_K: return 144;
        case GGML_TYPE_Q5_K: return 176; case GGML_TYPE_Q6_K: return 210; default: abort(); } }
    size_t ggml_row_size(enum ggml_type t, int64_t n) { return ggml_type_size(t) * (n / 256); }
    C
    gcc -O2 -fPIC -shared -Iinclude -Isrc src/ggml-quants.c stub.c -o libggmlquants.so -lm
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bitnet.ptq import KQuant, LayerStats
from bitnet.ptq.hessian import relative_error
from bitnet.quant.ggml import GGMLWeight, block_format

Matrices = list[tuple[Tensor, LayerStats]]
TYPES = "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K"


def by_ggml(library: ctypes.CDLL, weight: Tensor, type: str, importance: Tensor | None) -> GGMLWeight:
    form = block_format(type)
    rows, columns = weight.shape
    data = torch.empty(rows, columns // form.block * form.nbytes, dtype=torch.uint8)
    held = [weight.contiguous(), data, None if importance is None else importance.contiguous()]
    source, target, weights = (None if each is None else ctypes.c_void_p(each.data_ptr()) for each in held)
    function = getattr(library, f"quantize_{type.lower().replace('_k', '_K')}")
    function(source, target, ctypes.c_int64(rows), ctypes.c_int64(columns), weights)
    return GGMLWeight(data, type, columns)


def statistics(x: Tensor) -> LayerStats:
    hessian = x.T @ x / len(x)
    return LayerStats(n_tokens=len(x), hessian=hessian, mean_square=hessian.diagonal().clone())


def random_matrices() -> Matrices:
    def make(rows: int, columns: int) -> tuple[Tensor, LayerStats]:
        mixing = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
        return torch.randn(rows, columns) * 0.02, statistics(
            torch.randn(4096, columns) @ mixing * torch.rand(columns).exp()
        )

    return [make(512, 1024) for _ in range(4)]


@torch.no_grad()
def matrices_of(folder: str, text: str, tokens: int = 32768) -> Matrices:
    """The linears of a model's blocks, and statistics of their inputs over the beginning of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt").input_ids[0, :tokens]
    found: dict[nn.Linear, Tensor] = {}

    def watch(module: nn.Module, arguments: tuple[Tensor], _: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        x = arguments[0].flatten(0, -2)
        found[module] = found.get(module, torch.zeros(())) + x.T @ x / len(ids)

    linears = [each for each in model.model.modules() if isinstance(each, nn.Linear)]
    for linear in linears:
        linear.register_forward_hook(watch)  # type: ignore[arg-type]
    for window in ids[: len(ids) // 256 * 256].view(-1, 256).split(8):
        model(window)
    return [
        (each.weight.detach(), LayerStats(n_tokens=len(ids), hessian=found[each], mean_square=found[each].diagonal()))
        for each in linears
        if each.in_features % 256 == 0
    ]


def measure(matrices: Matrices, quantize: Callable[[Tensor, LayerStats], GGMLWeight]) -> tuple[float, float, float]:
    """Mean relative squared error, mean relH, CPU seconds."""
    squared = weighted = seconds = 0.0
    for weight, stats in matrices:
        assert stats.hessian is not None
        began = time.process_time()
        values = quantize(weight, stats).dequantize()
        seconds += time.process_time() - began
        squared += float((weight - values).square().sum() / weight.square().sum()) / len(matrices)
        weighted += relative_error(weight, values, stats.hessian) / len(matrices)
    return squared, weighted, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", help="ggml-quants.c as a shared library")
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--text", help="file to run through it")
    parser.add_argument("--types", default=TYPES)
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.text is None):
        parser.error("--model and --text go together")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    library = None if arguments.library is None else ctypes.CDLL(str(Path(arguments.library).resolve()))
    if library is None:
        print("no --library: ggml itself is not compared")
    matrices = random_matrices() if arguments.model is None else matrices_of(arguments.model, arguments.text)
    print(
        f"{len(matrices)} matrices, {sum(w.numel() for w, _ in matrices) / 1e6:.2f}M weights, torch {torch.__version__}"
    )
    print(f"{'':40}{'squared':>11}{'relH':>11}{'seconds':>9}   ratios")
    for name in arguments.types.split(","):
        for importance in (False, True):
            label = f"{name}{', importance,' if importance else ','}"
            base = None
            if library is not None:
                base = measure(
                    matrices,
                    lambda w, s, name=name, weigh=importance: by_ggml(
                        library, w, name, s.mean_square if weigh else None
                    ),
                )
                print(f"{label + ' ggml':40}{base[0]:11.3e}{base[1]:11.3e}{base[2]:9.1f}")
            methods = {"": KQuant(type=name, importance=importance)}
            if importance:
                methods |= {f"with feedback, {n} sweeps": KQuant(type=name, feedback=True, sweeps=n) for n in (0, 2)}
            for kind, method in methods.items():
                ours = measure(matrices, method.quantize)
                ratios = (
                    ""
                    if base is None
                    else f"   {ours[0] / base[0]:.3f} {ours[1] / base[1]:.3f} {ours[2] / base[2]:.1f}"
                )
                print(f"{f'{label} here {kind}':40}{ours[0]:11.3e}{ours[1]:11.3e}{ours[2]:9.1f}{ratios}", flush=True)


if __name__ == "__main__":
    main()
