"""Uniform grids for weights: how many levels, how many values share a scale, which range they cover, how it is stored.

The grid is fitted first and codes are rounded to it afterwards, because methods that compensate errors round the same
column several times. Scales are rounded to the dtype they are stored in *before* any code is computed, so that the
codes are right for the values that a file really holds.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from bitnet.errors import InputError
from bitnet.quant.absmax import check_bits
from bitnet.quant.grouping import Granularity, group_size_of, grouped
from bitnet.quant.ranges import Codes, RangeRule, Sample, range_rule
from bitnet.quant.rounding import round_to_codes
from bitnet.quant.types import QTensor

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Grid:
    """A uniform grid: ``value = (code - zero_point) * scale``.

    Args:
        bits: 2 to 8; or 1.58 for the three levels -1, 0, +1 (symmetric).
        symmetric: codes -(2^(bits-1) - 1) to 2^(bits-1) - 1 without a zero point; else all 2^bits codes with one.
        granularity: "tensor", "row" or a group size: what shares a scale.
        range: "minmax", "percentile", "mse", "entropy" (one scale a tensor only) or "absmean" (ternary only); see
            `bitnet.quant.ranges`.
        scale_dtype: "float16", "bfloat16" or "float32": how scales are stored.
        percentile: share of the values that range percentile covers, in percent.
        norm: exponent of the error that range mse minimises; GPTQ's published code has 2.4.
    """

    bits: float | int = 4
    symmetric: bool = False
    granularity: Granularity = 128
    range: str = "minmax"
    scale_dtype: str = "float16"
    percentile: float | int = 99.9
    norm: float | int = 2.0

    def __post_init__(self) -> None:
        if self.bits != 1.58:
            if self.bits != int(self.bits):
                raise InputError(f"bits must be 2 to 8, or 1.58 for ternary weights, got {self.bits}")
            check_bits(int(self.bits))
        elif not self.symmetric:
            raise InputError("ternary weights (bits=1.58) have a symmetric grid: set symmetric=true")
        group_size_of(self.granularity)
        self._rule  # noqa: B018  # raises for a name or an option that is wrong
        if self.range == "entropy" and self.granularity != "tensor":
            raise InputError(
                f"range entropy compares distributions, which the values of one scale are too few for: set "
                f"granularity=tensor, got {self.granularity}, or choose range=mse"
            )
        if self.range == "absmean" and self.bits != 1.58:
            raise InputError(
                f"range absmean is for ternary weights (bits=1.58), got bits={self.bits}: choose range=mse"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise InputError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}, got {self.scale_dtype!r}")

    @property
    def levels(self) -> int:
        if self.bits == 1.58:
            return 3
        return 2 ** int(self.bits) - (1 if self.symmetric else 0)

    @property
    def low(self) -> int:
        """The smallest code."""
        return self.codes.low

    @property
    def high(self) -> int:
        """The largest code."""
        return self.codes.high

    @property
    def codes(self) -> Codes:
        """The codes, and the dtype of their scale."""
        return Codes(self.levels, self.symmetric, SCALE_DTYPES[self.scale_dtype])

    @property
    def _rule(self) -> RangeRule:
        return range_rule(self.range, percent=self.percentile, norm=self.norm)

    def fit(
        self, weight: Float[Tensor, "out in"], importance: Float[Tensor, " in"] | None = None
    ) -> tuple[Float[Tensor, "rows groups"], Int8[Tensor, "rows groups"] | None]:
        """Scale and zero point for ``weight``, shaped as in `QTensor`; the scale in its stored dtype.

        Args:
            weight: the values to cover.
            importance: weight of each column's squared error where the range is searched; None: all equal.
        """
        values = grouped(weight.float(), self.granularity)
        counts = None
        if values.numel() > weight.numel():  # a narrow last group was filled up with zeros that are no weights
            counts = grouped(torch.ones_like(weight[:1], dtype=torch.float32), self.granularity)
        if importance is not None:
            importance = grouped(importance.float().expand_as(weight), self.granularity)
        low, high = self._rule(Sample.of_values(values, counts, importance), self.codes)
        return self.codes.parameters(low, high)

    def round(self, weight: Float[Tensor, "out in"], scale: Tensor, zero_point: Tensor | None) -> QTensor:
        """``weight`` on the grid of ``scale`` and ``zero_point``: half to even, in float32."""
        size = group_size_of(self.granularity)
        codes = round_to_codes(weight, scale.float(), size, self.low, self.high, zero_point)
        return QTensor(codes, scale, self.levels, zero_point, size)

    def quantize(self, weight: Float[Tensor, "out in"], importance: Float[Tensor, " in"] | None = None) -> QTensor:
        """Fit the grid and round to it."""
        return self.round(weight, *self.fit(weight, importance))

    def __call__(self, weight: Float[Tensor, "out in"]) -> QTensor:
        """`quantize` as a `Quantizer`, for training: the grid is fitted anew in every forward pass."""
        return self.quantize(weight.detach())
