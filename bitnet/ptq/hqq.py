"""HQQ: half-quadratic quantization, which needs no calibration text.

The scale of a group comes from its minimum and maximum and stays. The zero point is a real number, and 20 rounds look
for the one with the least ``sum |w - (q - z) s|^p``, p = 0.7: a norm that lets few weights err much where most then err
less. Half-quadratic splitting makes each round closed-form. The error ``r = w - (q - z) s`` is shrunk by the proximal
operator of the norm, ``e = sign(r) max(|r| - |r|^(p-1) / beta, 0)``; the zero point becomes the mean of
``q - (w - e) / s``; beta grows by a factor. The best zero point of all rounds is kept.

Residuals are measured in steps of the grid here, so that beta means the same for a layer of large weights as for one of
small ones. Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq.protocol import LayerStats, Statistic
from bitnet.quant import Granularity
from bitnet.quant.absmax import check_bits
from bitnet.quant.grid import SCALE_DTYPES
from bitnet.quant.grouping import group_size_of, grouped, per_column
from bitnet.quant.packing import packed_bits

ROUNDS = 20
POWER = 0.7  # p of the norm
BETA, GROWTH = 10.0, 1.01
CHUNK = 2**18  # weights at a time: memory does not grow with the matrix


@dataclass(frozen=True, slots=True)
class FloatZeroPoint:
    """Codes on a uniform grid whose zero point is a real number: ``value = (code - zero_point) * scale``.

    0.0 need not be one of the values. Otherwise like `bitnet.quant.QTensor`.

    Attributes:
        qdata: codes, int8 [out, in].
        scale: [out or 1, groups], in the dtype in which it is stored and counted.
        zero_point: in codes; shape and dtype of ``scale``.
        levels: number of values a code can take.
        group_size: columns that share a scale; None for the whole row or matrix.
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor
    levels: int
    group_size: int | None = None

    @property
    def shape(self) -> torch.Size:
        return self.qdata.shape

    @property
    def bits_per_weight(self) -> float:
        per_group = 8 * (self.scale.element_size() + self.zero_point.element_size())
        return (packed_bits(self.shape, self.levels) + per_group * self.scale.numel()) / self.qdata.numel()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Computed in float32, rounded once to ``dtype``."""
        scale, zero_point = self.scale.float(), self.zero_point.float()
        if self.group_size is not None:
            scale = per_column(scale, self.group_size, self.shape[1])
            zero_point = per_column(zero_point, self.group_size, self.shape[1])
        return ((self.qdata.float() - zero_point) * scale).to(dtype)


@dataclass(frozen=True, slots=True)
class HQQ:
    """Half-quadratic quantization.

    Args:
        bits: 2 to 8.
        granularity: "tensor", "row" or a group size: what shares a scale and a zero point.
        scale_dtype: "float16", "bfloat16" or "float32": how scales and zero points are stored.

    Raises:
        InputError: options that do not fit.
    """

    bits: int = 4
    granularity: Granularity = 64
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        group_size_of(self.granularity)
        if self.scale_dtype not in SCALE_DTYPES:
            raise InputError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}, got {self.scale_dtype!r}")

    @property
    def requires(self) -> frozenset[Statistic]:
        return frozenset()

    @property
    def claimed_bits(self) -> float:
        return self.bits

    def quantize(self, weight: Float[Tensor, "out in"], stats: LayerStats | None) -> FloatZeroPoint:
        """Codes, and scales and zero points as stored; the codes are right for these. float32, half to even.

        Raises:
            InputError: a weight is NaN or infinite, or a scale is too large for its dtype.
        """
        if not bool(torch.isfinite(weight).all()):
            raise InputError("the weight holds NaN or infinity: check the checkpoint")
        weight = weight.detach().float()
        values = grouped(weight, self.granularity)
        members = grouped(torch.ones_like(weight), self.granularity)
        scale = self._scale(values)
        step = max(CHUNK // values[0].numel(), 1)
        parts = [
            self._zero_point(values[at : at + step], scale[at : at + step].float(), members[at : at + step])
            for at in range(0, len(values), step)
        ]
        zero = torch.cat(parts).to(scale.dtype)
        codes = self._codes(values, scale.float()[..., None], zero.float()[..., None])
        codes = codes.flatten(-2)[..., : weight.shape[1]] if self.granularity != "tensor" else codes
        size = group_size_of(self.granularity)
        return FloatZeroPoint(codes.reshape(weight.shape).to(torch.int8), scale, zero, 2**self.bits, size)

    def _scale(self, values: Tensor) -> Tensor:
        """From minimum to maximum with 0.0 between, as stored."""
        span = (values.amax(-1).clamp(min=0) - values.amin(-1).clamp(max=0)).clamp(min=1e-5)
        scale = (span / (2**self.bits - 1)).to(SCALE_DTYPES[self.scale_dtype])
        if not bool(torch.isfinite(scale).all()):
            raise InputError(f"the weights are too large for scales in {self.scale_dtype}: set scale_dtype to bfloat16")
        return scale

    def _zero_point(self, values: Tensor, scale: Tensor, members: Tensor) -> Tensor:
        """The best zero point of all rounds, for each group; ``members`` is 0 where a group was filled up."""
        steps = values / scale[..., None]
        count = members.sum(-1)
        zero = -steps.amin(-1).clamp(max=0) - 2 ** (self.bits - 1)
        best, least, beta = zero, torch.full_like(zero, torch.inf), BETA
        for _ in range(ROUNDS + 1):
            stored = zero.to(SCALE_DTYPES[self.scale_dtype]).float()[..., None]
            codes = self._codes(values, scale[..., None], stored)
            residual = steps - (codes - stored)
            size = residual.abs()
            error = (size.pow(POWER) * members).sum(-1)
            best, least = torch.where(error < least, zero, best), torch.minimum(error, least)
            shrunk = residual.sign() * (size - size.clamp(min=1e-9).pow(POWER - 1) / beta).clamp(min=0)
            zero = ((codes - steps + shrunk) * members).sum(-1) / count
            beta *= GROWTH
        return best

    def _codes(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        return (values / scale + zero).round().clamp(-half, half - 1)
