"""``torch.ops.bitnet.packed_linear``: the operator that a packed model runs on.

What it answers is defined here, in plain PyTorch: quantize the inputs, unpack the codes, multiply codes, rescale. This
reference runs wherever no kernel is registered for the device. A kernel has to give the same integers, so the operator
answers like the frozen layer (`bitnet.nn.QuantizedLinear`) bit for bit.
"""

import torch
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ops.reference import quantized_linear
from bitnet.quant.absmax import absmax, absmax_b1
from bitnet.quant.packing import LAYOUTS, packed_columns, unpack
from bitnet.quant.types import QTensor

ACTIVATIONS = {"absmax": absmax, "absmax_b1": absmax_b1}


@torch.library.custom_op("bitnet::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: str, activation: str = "absmax"
) -> Tensor:
    """``activation(x)`` times the unpacked weight, plus bias, in the dtype of ``x``.

    Args:
        x: inputs [*rows, in], floating.
        packed: codes [out, bytes] uint8, packed by `bitnet.quant.pack` in ``layout``.
        scale: what multiplies the codes: float32 [1, 1] (one for the tensor) or [out, 1] (one a row).
        bias: [out] or None; added in float32 after the rescaling.
        layout: "i2", "t5" or "b1".
        activation: quantizer of the inputs: "absmax" (b1.58) or "absmax_b1", one scale a row, int8.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, an unknown layout or activation.
    """
    check_arguments(x, packed, scale, bias, layout, activation)
    form = LAYOUTS[layout]
    weight = QTensor(unpack(packed, layout, x.shape[-1]), scale, levels=len(form.codes))
    return quantized_linear(ACTIVATIONS[activation](x), weight, bias, x.dtype)


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: str, activation: str = "absmax") -> Tensor:
    check_arguments(x, packed, scale, bias, layout, activation)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def check_arguments(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, layout: str, activation: str
) -> None:
    """Raise InputError for arguments that no kernel takes; looks at shapes, dtypes and devices only."""
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not x.is_floating_point() or x.dim() == 0:
        raise InputError(f"x must be floating, [*rows, in], got {x.dtype} {list(x.shape)}")
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
