"""What turning inputs is worth at 4 bits: squared error of the projections' inputs, and the loss with dense weights.

python benchmarks/rotation.py MODEL TEXT.json.gz     # ../shared/reference: llama-pretrained, c4/en/c4-validation...
"""

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from bitnet.models import from_directory
from bitnet.quant import QTensor, Rotated, absmax, absmean_int4, rotate

KINDS = {"q_proj": "q, k, v", "o_proj": "o", "gate_proj": "gate, up", "down_proj": "down"}  # k, v, up read the same


class Rounded(nn.Module):
    """A dense linear layer whose inputs are quantized, and turned back where they were turned."""

    def __init__(self, linear: nn.Linear, quantizer: Callable[[Tensor], QTensor], turned: bool) -> None:
        super().__init__()
        self.linear, self.quantizer, self.turned = linear, quantizer, turned

    def forward(self, x: Tensor) -> Tensor:
        values = self.quantizer(x).dequantize()
        return self.linear(rotate(values) if self.turned else values)


def windows(model: str, text: str, count: int, length: int = 256) -> Tensor:
    with gzip.open(text, "rt", encoding="utf-8") as file:
        words = "\n\n".join(json.loads(line)["text"] for line in file)
    ids = AutoTokenizer.from_pretrained(model)(words[: 8 * count * length])["input_ids"]
    return torch.tensor(ids[: count * length]).reshape(count, length)


@torch.no_grad()
def loss(model: nn.Module, ids: Tensor) -> float:
    rows = [model(input_ids=each).logits[:, :-1].flatten(0, 1) for each in ids.split(8)]
    return float(nn.functional.cross_entropy(torch.cat(rows).double(), ids[:, 1:].flatten()))


@torch.no_grad()
def errors(model: nn.Module, ids: Tensor) -> dict[str, dict[str, float]]:
    """Squared error / squared inputs, summed over the layers of a kind, with and without turning."""
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(6, dtype=torch.float64))

    def look(kind: str, x: Tensor) -> None:
        turned = rotate(x)
        found = [
            (quantized.dequantize() - values).square().sum().double()
            for quantizer in (absmean_int4, absmax)
            for values in (x, turned)
            for quantized in [quantizer(values)]
        ]
        peak = (x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean().double()
        sums[kind] += torch.stack([x.square().sum().double(), *found, peak])

    layers = [(KINDS.get(name.split(".")[-1], ""), each) for name, each in model.named_modules()]
    layers = [(kind, each) for kind, each in layers if kind]
    hooks = [each.register_forward_pre_hook(lambda _, args, kind=kind: look(kind, args[0])) for kind, each in layers]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    blocks = len(layers) // len(KINDS)
    names = ("a4", "a4 turned", "a8", "a8 turned")
    return {
        kind: {name: float(each / row[0]) for name, each in zip(names, row[1:5], strict=True)}
        | {"largest/rms": float(row[5]) / blocks}
        for kind, row in sums.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=64)
    options = parser.parse_args()
    ids = windows(options.model, options.text, options.windows)
    model = from_directory(options.model).eval()
    for kind, row in errors(model, ids[:16]).items():
        print(kind, {name: float(f"{value:.3g}") for name, value in row.items()})
    plain = loss(model, ids)
    print(f"loss {plain:.4f} on {ids.numel()} tokens")
    linears = {name: each for name, each in model.model.named_modules() if isinstance(each, nn.Linear)}
    for said, bits, which in (
        ("a8", 8, ()),
        ("a4", 4, ()),
        ("a4, o and down turned", 4, ("o_proj", "down_proj")),
        ("a4, all turned", 4, ("proj",)),
        ("o and down in a4, the others in float", 4, None),
        ("o and down in a4 turned, the others in float", 4, ("o_proj", "down_proj", None)),
    ):
        for name, linear in linears.items():
            chosen = bool(which) and name.endswith(tuple(each for each in which if each))
            alone = which is None or None in which
            if alone and not name.endswith(("o_proj", "down_proj")):
                continue
            quantizer = Rotated(bits) if chosen else Rotated(bits).quantizer
            model.model.set_submodule(name, Rounded(linear, quantizer, chosen))
        print(f"{said}: {loss(model, ids) - plain:+.4f}")
        for name, linear in linears.items():
            model.model.set_submodule(name, linear)


if __name__ == "__main__":
    main()
