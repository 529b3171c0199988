"""4-bit activations of BitNet a4.8 and v2: in units of their mean magnitude, the largest ones clipped."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.quant.grouping import Granularity, group_size_of
from bitnet.quant.rounding import round_to_codes
from bitnet.quant.statistics import mean_magnitude
from bitnet.quant.types import QTensor


def absmean_int4(x: Float[Tensor, "*rows cols"], *, granularity: Granularity = "row", eps: float = 1e-5) -> QTensor:
    """Round to the codes -8 ... 7 with ``scale = clamp(mean|x|, eps) / sqrt(7)``, by default one scale a row (a token).

    The range ends at 2.6 times the mean magnitude above zero and at 3.0 times below: of normal inputs at 2.1 and 2.4
    standard deviations. The mean is clamped, not the scale; float32, half to even.
    Source: BitNet a4.8, arXiv:2411.04965, eq. 4; BitNet v2, arXiv:2504.18415, eq. 4.
    """
    mean = mean_magnitude(x, granularity).clamp(min=eps)
    scale = mean / torch.full_like(mean, math.sqrt(7))  # by a tensor: by a number CUDA would multiply by its reciprocal
    size = group_size_of(granularity)
    return QTensor(round_to_codes(x.detach(), scale, size, -8, 7), scale, levels=16, group_size=size)
