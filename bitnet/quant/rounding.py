"""The one rounding rule: float32, divide by the scale, half to even, clamp."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor


def round_to_codes(
    x: Float[Tensor, "*rows cols"],
    scale: Float[Tensor, "*scale_rows groups"],
    group_size: int | None,
    low: int,
    high: int,
    zero_point: Tensor | None = None,
) -> Int8[Tensor, "*rows cols"]:
    """``clamp(round(x / scale) + zero_point, low, high)`` as int8.

    Divides by the scale (a tensor, so a true division on every device) instead of multiplying by its reciprocal, which
    would round differently in the last bit and, at a tie, in the code. A NaN or an infinity in ``x`` has no code,
    but it is not lost: it made the scale NaN or infinite, and with it no value of its group is finite.
    """
    if group_size is not None:
        columns = x.shape[-1]
        scale = scale.repeat_interleave(group_size, dim=-1)[..., :columns]
        if zero_point is not None:
            zero_point = zero_point.repeat_interleave(group_size, dim=-1)[..., :columns]
    codes = (x.float() / scale).round_()
    if zero_point is not None:
        codes += zero_point
    return codes.clamp_(low, high).to(torch.int8)
