"""The one rounding rule: float32, divide by the scale, half to even, clamp."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from bitnet.quant.grouping import per_column


def round_to_codes(
    x: Float[Tensor, "*rows cols"],
    scale: Float[Tensor, "*scale_rows groups"],
    group_size: int | None,
    low: int,
    high: int,
    zero_point: Tensor | None = None,
) -> Int8[Tensor, "*rows cols"]:
    """``clamp(round(x / scale) + zero_point, low, high)`` as int8.

    Divides by the scale instead of multiplying by its reciprocal, which would round differently in the last bit and,
    at a tie, in the code. (By a tensor: eager PyTorch then divides truly on every device.) A NaN or an infinity in
    ``x`` has no code, but it is not lost: it made the scale NaN or infinite, and with it no value of its group is
    finite.
    """
    if group_size is not None:
        scale = per_column(scale, group_size, x.shape[-1])
        if zero_point is not None:
            zero_point = per_column(zero_point, group_size, x.shape[-1])
    codes = (x.float() / scale).round_()
    if zero_point is not None:
        codes += zero_point
    return codes.clamp_(low, high).to(torch.int8)


def stored(scale: Float[Tensor, "*sets"], dtype: torch.dtype) -> Float[Tensor, "*sets"]:
    """``scale`` rounded to the dtype it is stored in.

    Through an operator that is opaque to compilers where it is narrower: torch 2.13 on a CPU fuses a conversion to
    float16 and back into nothing, and codes would be those of a scale that no file holds.
    """
    return scale if scale.dtype == dtype else _converted(scale, dtype)


@torch.library.custom_op("bitnet::converted", mutates_args=())
def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


@_converted.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)
