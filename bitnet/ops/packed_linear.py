"""``torch.ops.bitnet.packed_linear``: the operator that a packed model runs on.

What it answers is defined here, in plain PyTorch: quantize the inputs, unpack the codes, multiply codes, rescale. This
reference runs wherever no kernel is registered for the device. A kernel has to give the same integers, so the operator
answers like the frozen layer (`bitnet.nn.QuantizedLinear`) bit for bit.

``import bitnet.ops`` registers it: a process that only loads a program with `torch.export.load` needs that import too.

A kernel for a device is a function of the operator's arguments, which calls `check_arguments` first::

    LIBRARY.impl("packed_linear", function, "CUDA")

Declared with `torch.library.Library` rather than ``custom_op``, whose wrapper costs 20 to 50 microseconds a call (this:
10); a layer of 2560 x 2560 takes 150.
"""

from typing import Any

import torch
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ops.activations import ACTIVATIONS
from bitnet.ops.reference import quantized_linear
from bitnet.quant.packing import LAYOUTS, packed_columns, unpack
from bitnet.quant.types import QTensor

LIBRARY = torch.library.Library("bitnet", "FRAGMENT")
LIBRARY.define(
    "packed_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, str layout, str activation='absmax') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
OPERATOR = torch.ops.bitnet.packed_linear.default


def packed_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: str, activation: str = "absmax"
) -> Tensor:
    """``activation(x)`` times the unpacked weight, plus bias, in the dtype of ``x``.

    Not differentiable: a frozen layer does not train. Results are exact up to 131072 columns (float32 holds the sum);
    of longer rows the product is one of dequantized values, and rounds. ``import bitnet.ops`` registers it as
    ``torch.ops.bitnet.packed_linear``, which a program saved by `torch.export` needs before it is loaded.

    Args:
        x: inputs [*rows, in], floating.
        packed: codes [out, bytes] uint8, packed by `bitnet.quant.pack` in ``layout``.
        scale: what multiplies the codes: float32 [1, 1] (one for the tensor) or [out, 1] (one a row).
        bias: [out] or None; added in float32 after the rescaling.
        layout: "i2", "t5" or "b1".
        activation: quantizer of the inputs: "absmax" (b1.58) or "absmax_b1", one scale a row, int8. A row with a NaN or
            an infinity in it gives NaN.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, an unknown layout or activation, or bytes that no codes
            pack to.
    """
    return OPERATOR(x, packed, scale, bias, layout, activation)


def reference_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: str, activation: str = "absmax"
) -> Tensor:
    """What the operator answers, in plain PyTorch; unpacks the weight in every call."""
    check_arguments(x, packed, scale, bias, layout, activation)
    weight = QTensor(unpack(packed, layout, x.shape[-1]), scale, levels=len(LAYOUTS[layout].codes))
    return quantized_linear(ACTIVATIONS[activation](x), weight, bias, x.dtype)


@torch.library.register_fake("bitnet::packed_linear", lib=LIBRARY)
def _fake(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: str, activation: str = "absmax"
) -> Tensor:
    check_arguments(x, packed, scale, bias, layout, activation)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


class _NoGradient(torch.autograd.Function):
    """The operator below autograd; a backward pass through it is an error, and no gradient of zero."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return OPERATOR(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise InputError(
            "packed_linear has no gradient: train a BitLinear and pack it afterwards, or keep what needs gradients "
            "below this layer out of the loss"
        )


def _autograd(*arguments: Any) -> Tensor:
    if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments):
        return _NoGradient.apply(*arguments)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return OPERATOR(*arguments)


LIBRARY.impl("packed_linear", reference_linear, "CompositeExplicitAutograd")
LIBRARY.impl("packed_linear", _autograd, "Autograd")


def check_arguments(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: str, activation: str
) -> None:
    """Raise InputError for arguments that no kernel takes; looks at shapes, dtypes and devices only."""
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        raise InputError(f"x must be floating, [*rows, in >= 1], got {x.dtype} {list(x.shape)}")
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        raise InputError(f"packed must be uint8 [out, bytes], got {packed.dtype} {list(packed.shape)}")
    out, expected = packed.shape[0], packed_columns(x.shape[-1], layout)
    if packed.shape[1] != expected:
        raise InputError(
            f"{x.shape[-1]} input features take {expected} bytes a row in layout {layout}, got {packed.shape[1]}"
        )
    if scale.dtype != torch.float32 or tuple(scale.shape) not in ((1, 1), (out, 1)):
        raise InputError(f"scale must be float32 [1, 1] or [{out}, 1], got {scale.dtype} {list(scale.shape)}")
    if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != (out,)):
        raise InputError(f"bias must be floating, [{out}], got {bias.dtype} {list(bias.shape)}")
    for name, tensor in (("packed", packed), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise InputError(f"{name} is on {tensor.device} and x on {x.device}: move the layer with .to({x.device})")
