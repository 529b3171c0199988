"""A dense layer in 8 bits, run by the ternary kernels: every code is a number of five digits that are -1, 0 or +1.

For an output head, whose bytes are most of what a small packed model reads for a token. The product with the plane of
one digit is one of ternary codes, so ``torch.ops.bitnet.packed_linear`` computes it: the same bits on every processor::

    value = scale of the row * (d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4)        243 levels, 10 bits a weight with i2

Weights and inputs are rounded: it is lossy, and only used where it is asked for.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.nn.linears import is_linear
from bitnet.nn.quantized_linear import QuantizedLinear
from bitnet.ops import packed_linear
from bitnet.quant.packing import pack

DIGITS = 5
LARGEST = (3**DIGITS - 1) // 2  # 121


class DigitLinear(nn.Module):
    """``x`` in int8 (absmax of a token) times a weight in 243 levels (absmax of a row), plus bias.

    The planes' products are exact integers, each is rescaled in float32, and the five are added from the lowest digit
    up. Answers are float32.

    Args:
        weight: [out, in], finite.
        bias: [out] or None.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None = None) -> None:
        super().__init__()
        weight = weight.detach().float()
        if not bool(torch.isfinite(weight).all()):
            raise InputError("expected a weight that is finite: it was damaged, or the training diverged")
        self.out_features, self.in_features = weight.shape
        step = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / LARGEST
        codes = (weight / step).round()
        planes, steps = [], []
        for power in range(DIGITS):
            higher = ((codes + 1) / 3).floor()  # what is left once the lowest digit is taken away
            planes.append(pack((codes - 3 * higher).to(torch.int8), "i2"))
            steps.append(step * 3**power)
            codes = higher
        self.register_buffer("packed", torch.cat(planes))
        self.register_buffer("scale", torch.cat(steps))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        products = packed_linear(input.float(), self.packed, self.scale, None, "i2", "absmax")
        lowest, second, *others = products.split(self.out_features, dim=-1)
        y = lowest + second
        for each in others:
            y += each
        return y if self.bias is None else y + self.bias

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # torch leaves it untyped
        """Move like any module, but keep the scale in float32: ``model.bfloat16()`` must not change a weight."""
        before = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != before.dtype:
            self.scale = before.to(self.scale.device)
        return self


def round_head(model: nn.Module) -> None:
    """Replace the output head of a causal language model by its `DigitLinear`; embeddings that it shared stay.

    Raises:
        InputError: the model has no head that is a linear layer on inputs in float.
    """
    name = next((name for name, _ in model.named_modules() if name.split(".")[-1] == "lm_head"), None)
    head = None if name is None else model.get_submodule(name)
    if isinstance(head, nn.Linear) and is_linear(head):  # a BitLinear is none: it computes with other values
        weight = head.weight
    elif isinstance(head, QuantizedLinear) and head.activation is None:
        weight = head.weight.dequantize()
    else:
        raise InputError(f"expected an lm_head in float to round to 8 bits, got {type(head).__name__}")
    assert name is not None
    model.set_submodule(name, DigitLinear(weight, head.bias))
