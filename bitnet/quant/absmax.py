"""Symmetric rounding to the maximum: int8 activations of BitNet, and the absmax baseline for weights."""

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.quant.grouping import Granularity, group_size_of, grouped
from bitnet.quant.rounding import round_to_codes
from bitnet.quant.types import QTensor


def absmax(
    x: Float[Tensor, "*rows cols"], *, bits: int = 8, granularity: Granularity = "row", eps: float = 1e-5
) -> QTensor:
    """Round to ``2^bits - 1`` levels between -max|x| and +max|x|, by default with one scale a row (a token).

    ``scale = clamp(max|x|, eps) / (2^(bits-1) - 1)``: the maximum is clamped, not the scale, so small inputs keep their
    codes. float32, half to even. Source: BitNet b1.58, arXiv:2402.17764, sec. 2; LLM.int8, arXiv:2208.07339, eq. 2.

    Raises:
        InputError: ``bits`` outside 2..8.
    """
    top = 2 ** (check_bits(bits) - 1) - 1
    return _to_maximum(x, granularity, eps, steps=top, low=-top, high=top)


def absmax_b1(x: Float[Tensor, "*rows cols"], *, granularity: Granularity = "row", eps: float = 1e-5) -> QTensor:
    """The int8 activations of BitNet b1: 128 steps to the maximum, which itself is clipped to 127 steps on either side.

    Source: BitNet, arXiv:2310.11453, eq. 4-6 with Q_b = 128 (its epsilon is one code here); per token as at inference.
    """
    return _to_maximum(x, granularity, eps, steps=128, low=-127, high=127)


def check_bits(bits: float | int) -> int:
    """Raises InputError unless 2 <= bits <= 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise InputError(
            f"bits must be 2 to 8, got {bits!r}: whole numbers only; for 1 bit use centred_sign, for 16 leave the "
            "layer as it is"
        )
    return bits


def _to_maximum(x: Tensor, granularity: Granularity, eps: float, steps: int, low: int, high: int) -> QTensor:
    maximum = grouped(x.detach(), granularity).abs().amax(-1).float().clamp(min=eps)
    scale = maximum / torch.full_like(maximum, steps)  # by a tensor: by a number CUDA would multiply by its reciprocal
    size = group_size_of(granularity)
    return QTensor(round_to_codes(x.detach(), scale, size, low, high), scale, levels=high - low + 1, group_size=size)
