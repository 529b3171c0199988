"""PB-LLM: a share of the weights, the salient ones, in 8 bits, and the sign of each of the others.

Which weights are salient is decided beforehand, by ``w_ij^2 / U_jj^2`` (what an error in that place costs after the
compensation) or by magnitude. The others of a row become ``sign(w) * mean|w|``. Columns are rounded first to last, and
later ones make up for the error of earlier ones (`bitnet.ptq.compensation`). Source: arXiv:2310.00034, sec. 3.3.

The paper counts ``8 r + 1 (1 - r)`` bits for a share r: 1.7 at 10 %. Where the salient weights are has to be stored,
too: one bit for every weight, whatever the share.

::

    part         bits                       of a weight, 512 x 512, share 0.1
    signs        one a weight of the rest   1 - r = 0.9
    high         8 a salient weight         8 r = 0.8
    mask         one a weight               1
    scales       2 * 16 a row               32 / columns = 0.0625
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int8, UInt8
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq.billm.checks import alive, check_scales
from bitnet.ptq.billm.stored import pack_bits, unpack_bits
from bitnet.ptq.compensation import compensate
from bitnet.ptq.protocol import LayerStats, Statistic

SALIENCIES = ("hessian", "magnitude")


@dataclass(frozen=True, slots=True)
class PartialBinary:
    """A weight [rows, columns] of signs and, where the mask says so, 8-bit values.

    Attributes:
        signs: b1, one bit for every weight outside of the mask, row by row.
        high: the codes of the weights in the mask, row by row.
        mask: b1, rows * columns bits.
        low_scale: magnitude of the signs of a row.
        high_scale: step of the codes of a row.
        rows: out_features.
        columns: in_features.
    """

    signs: UInt8[Tensor, " sign_bytes"]
    high: Int8[Tensor, " salient"]
    mask: UInt8[Tensor, " mask_bytes"]
    low_scale: Float[Tensor, " rows"]
    high_scale: Float[Tensor, " rows"]
    rows: int
    columns: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.rows, self.columns])

    @property
    def parts(self) -> dict[str, float]:
        """Bits a weight that each tensor takes."""
        names = ("signs", "high", "mask", "low_scale", "high_scale")
        bits = {name: getattr(self, name).numel() * getattr(self, name).element_size() * 8 for name in names}
        return {name: count / (self.rows * self.columns) for name, count in bits.items()}

    @property
    def bits_per_weight(self) -> float:
        """All bytes of all tensors."""
        return sum(self.parts.values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        """The values: code or sign times its row's scale in float32, rounded once to ``dtype``."""
        mask = unpack_bits(self.mask, self.rows * self.columns).view(self.shape)
        codes = torch.zeros(self.shape, device=mask.device)
        codes[mask] = self.high.float()
        codes[~mask] = unpack_bits(self.signs, mask.numel() - self.high.numel()).float() * 2 - 1
        scale = torch.where(mask, self.high_scale.float()[:, None], self.low_scale.float()[:, None])
        return (codes * scale).to(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class PBLLM:
    """Signs beside a share of 8-bit weights.

    Args:
        share: of the weights, 0 to 1: how many are kept in 8 bits.
        saliency: "hessian" or "magnitude": which.
        damping: share of the mean diagonal added to the Hessian.
    """

    share: float = 0.1
    saliency: str = "hessian"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"share must be between 0 (signs alone) and 1 (8 bits everywhere), got {self.share}")
        if self.saliency not in SALIENCIES:
            raise InputError(f"saliency must be one of {', '.join(SALIENCIES)}, got {self.saliency!r}")
        if not 0 < self.damping <= 1:
            raise InputError(f"damping must be above 0 and at most 1 (of the mean diagonal), got {self.damping}")

    @property
    def requires(self) -> frozenset[Statistic]:
        return frozenset([Statistic.HESSIAN])

    @property
    def claimed_bits(self) -> float:
        """As the paper counts: 8 bits and 1 bit a weight, no mask and no scales."""
        return 8 * self.share + 1 - self.share

    def quantize(self, weight: Float[Tensor, "out in"], stats: LayerStats | None) -> PartialBinary:
        """Quantize ``weight``, in float32.

        Raises:
            InputError: a weight is NaN or infinite, or too large for scales of float16.
        """
        assert stats is not None
        assert stats.hessian is not None
        target = alive(weight, stats.hessian.diagonal())
        upper = stats.inverse_factor(self.damping).upper
        worth = target.abs() if self.saliency == "magnitude" else target.square() / upper.diagonal().square()
        count = round(self.share * target.numel())
        mask = torch.zeros(target.numel(), dtype=torch.bool, device=target.device)
        mask[worth.flatten().argsort(descending=True, stable=True)[:count]] = True
        grid = PartlyBinaryColumns.of(target, mask.view_as(target))
        check_scales(grid.low.half(), grid.high.half(), advice="ptq=billm has scales of any size")
        compensate(target.t().contiguous(), upper, grid)
        codes, mask = grid.codes.t(), grid.mask.t()
        signs, high = pack_bits(codes[~mask] > 0), codes[mask].contiguous()
        return PartialBinary(signs, high, pack_bits(mask), grid.low.half(), grid.high.half(), *target.shape)


@dataclass
class PartlyBinaryColumns:
    """What `compensate` rounds to. Scales are those of the weight before compensation, as they are stored.

    ``codes`` and ``mask`` are transposed, [in, out]: a column of the weight is contiguous.
    """

    mask: Bool[Tensor, "in out"]
    low: Float[Tensor, " out"]
    high: Float[Tensor, " out"]
    codes: Int8[Tensor, "in out"]

    @staticmethod
    def of(weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"]) -> "PartlyBinaryColumns":
        low = (weight.abs() * ~mask).sum(1) / (~mask).sum(1).clamp(min=1)
        high = weight.abs().amax(1) / 127
        codes = torch.zeros(weight.t().shape, dtype=torch.int8, device=weight.device)
        return PartlyBinaryColumns(mask.t().contiguous(), low.half().float(), high.half().float(), codes)

    @property
    def span(self) -> None:
        return None

    def fit(self, start: int, columns: Float[Tensor, "span out"]) -> None:
        """Scales are chosen beforehand."""

    def round(self, column: Float[Tensor, " out"], index: int) -> Float[Tensor, " out"]:
        """The nearest values to column ``index``; their codes are kept. Halves go to even, a sign of 0 is +1."""
        mask = self.mask[index]
        high = (column / torch.where(self.high > 0, self.high, 1.0)).round().clamp(-127, 127)
        codes = torch.where(mask, high, torch.where(column >= 0, 1.0, -1.0))
        self.codes[index] = codes.to(torch.int8)
        return codes * torch.where(mask, self.high, self.low)
