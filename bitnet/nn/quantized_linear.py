"""A linear layer whose weight is integer codes and a scale: what evaluation, export and reports see."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.ops import quantized_linear
from bitnet.quant import QTensor, Quantizer


class QuantizedLinear(nn.Module):
    """Frozen linear layer: ``activation(x)`` times the quantized weight, plus bias. Not trainable.

    The codes, the scale and the zero point are buffers (``qdata``, ``weight_scale``, ``weight_zero_point``).

    Args:
        weight: quantized weight [out, in].
        bias: [out] or None.
        activation: input [*rows, in] -> codes and scale; None leaves the input in float.
    """

    qdata: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def __init__(self, weight: QTensor, bias: Tensor | None = None, activation: Quantizer | None = None) -> None:
        super().__init__()
        if not bool((torch.isfinite(weight.scale) & (weight.scale > 0)).all()):
            raise InputError("every weight scale must be positive and finite: the weight was damaged or not quantized")
        self.out_features, self.in_features = weight.qdata.shape
        self.levels, self.group_size, self.activation = weight.levels, weight.group_size, activation
        self.register_buffer("qdata", weight.qdata)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("weight_zero_point", weight.zero_point)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> QTensor:
        """The quantized weight [out, in]."""
        return QTensor(self.qdata, self.weight_scale, self.levels, self.weight_zero_point, self.group_size)

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if self.activation is None:
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return nn.functional.linear(input, self.weight.dequantize(input.dtype), bias)
        return quantized_linear(self.activation(input), self.weight, self.bias, result_dtype(input))

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # torch leaves it untyped
        """Move like any module, but keep the scale in float32: ``model.bfloat16()`` must not change the weights."""
        scale = self.weight_scale
        super()._apply(fn, recurse)
        self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        bits = self.weight.bits_per_weight
        return f"in_features={self.in_features}, out_features={self.out_features}, bits_per_weight={bits:.3f}"


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer answers in: autocast's where it is on, else that of its input."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
