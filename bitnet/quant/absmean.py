"""The weights of BitNet b1.58: -1, 0 or +1, in units of their mean magnitude."""

from jaxtyping import Float
from torch import Tensor

from bitnet.quant.grouping import Granularity, group_size_of
from bitnet.quant.rounding import round_to_codes
from bitnet.quant.statistics import mean_magnitude
from bitnet.quant.types import QTensor


def absmean_ternary(
    weight: Float[Tensor, "*rows cols"], *, granularity: Granularity = "tensor", eps: float = 1e-5
) -> QTensor:
    """Round to {-1, 0, +1} in units of the mean magnitude, one unit for the whole matrix (or row, or group).

    The mean is clamped from below by ``eps``; division and rounding (half to even) are in float32.
    Source: BitNet b1.58, arXiv:2402.17764, eq. 1-3.
    """
    scale = mean_magnitude(weight, granularity).clamp(min=eps)
    size = group_size_of(granularity)
    return QTensor(round_to_codes(weight, scale, size, -1, 1), scale, levels=3, group_size=size)
