"""The weights of BitNet b1: -1 or +1 around the mean, in units of the mean magnitude."""

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.quant.grouping import Granularity, group_size_of
from bitnet.quant.statistics import mean, mean_magnitude
from bitnet.quant.types import QTensor


def centred_sign(
    weight: Float[Tensor, "*rows cols"], *, granularity: Granularity = "tensor", eps: float = 1e-5
) -> QTensor:
    """Sign of ``weight - mean(weight)`` in units of the mean magnitude of the uncentred weight; a zero counts as -1.

    The mean is over the tensor whatever the granularity of the scale is. Statistics in float32, magnitude clamped from
    below by ``eps``. Source: BitNet, arXiv:2310.11453, eq. 1-3 and 12.
    """
    scale = mean_magnitude(weight, granularity).clamp(min=eps)
    above = weight.float() > mean(weight)
    return QTensor(torch.where(above, 1, -1).to(torch.int8), scale, levels=2, group_size=group_size_of(granularity))
