"""Asymmetric rounding between minimum and maximum: the zero-point baseline."""

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.quant.absmax import check_bits
from bitnet.quant.grouping import Granularity, group_size_of, grouped
from bitnet.quant.rounding import round_to_codes
from bitnet.quant.types import QTensor


def zero_point(
    x: Float[Tensor, "*rows cols"], *, bits: int = 8, granularity: Granularity = "row", eps: float = 1e-5
) -> QTensor:
    """Round to ``2^bits`` levels over [min, max], widened to include 0.0, which always has a code of its own.

    ``scale = clamp(max - min, eps) / (2^bits - 1)``, ``zero_point = round(-min / scale) - 2^(bits-1)``, codes
    clamped to [-2^(bits-1), 2^(bits-1) - 1]. float32, half to even. Source: LLM.int8, arXiv:2208.07339, eq. 3-5.

    Raises:
        InputError: ``bits`` outside 2..8.
    """
    bottom = -(2 ** (check_bits(bits) - 1))
    top = -bottom - 1
    groups = grouped(x.detach().float(), granularity)
    low = groups.amin(-1).clamp(max=0)
    span = (groups.amax(-1).clamp(min=0) - low).clamp(min=eps)
    scale = span / torch.full_like(span, 2**bits - 1)
    zero = ((-low / scale).round() + bottom).clamp(bottom, top)
    size = group_size_of(granularity)
    codes = round_to_codes(x.detach(), scale, size, bottom, top, zero)
    return QTensor(codes, scale, levels=2**bits, zero_point=zero.to(torch.int8), group_size=size)
