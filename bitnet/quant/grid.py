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
from bitnet.quant.ranges import range_rule
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
        range: "minmax", "percentile", "mse", "entropy" or "absmean" (ternary only); see `bitnet.quant.ranges`.
        scale_dtype: "float16", "bfloat16" or "float32": how scales are stored.
    """

    bits: float = 4
    symmetric: bool = False
    granularity: Granularity = 128
    range: str = "minmax"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.bits != 1.58:
            if self.bits != int(self.bits):
                raise InputError(f"bits must be 2 to 8, or 1.58 for ternary weights, got {self.bits}")
            check_bits(int(self.bits))
        elif not self.symmetric:
            raise InputError("ternary weights (bits=1.58) have a symmetric grid: set symmetric=true")
        group_size_of(self.granularity)
        range_rule(self.range)
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
        return -(self.levels // 2)

    @property
    def high(self) -> int:
        """The largest code."""
        return self.low + self.levels - 1

    def fit(
        self, weight: Float[Tensor, "out in"], importance: Float[Tensor, " in"] | None = None
    ) -> tuple[Float[Tensor, "rows groups"], Int8[Tensor, "rows groups"] | None]:
        """Scale and zero point for ``weight``, shaped as in `QTensor`; the scale in its stored dtype.

        Args:
            weight: the values to cover.
            importance: weight of each column's squared error where the range is searched; None: all equal.
        """
        values = grouped(weight.float(), self.granularity)
        if importance is not None:
            importance = grouped(importance.float().expand_as(weight), self.granularity)
        low, high = range_rule(self.range)(values, importance, self.levels, self.symmetric)
        return self.parameters(low, high)

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of the grid over [low, high]; ``low <= 0 <= high``."""
        span = (high - low).clamp(min=1e-5)
        scale = span / torch.full_like(span, self.levels - 1)
        dtype = SCALE_DTYPES[self.scale_dtype]
        stored = scale.to(dtype).clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
        if self.symmetric:
            return stored, None
        zero = ((-low / stored.float()).round() + self.low).clamp(self.low, self.high)
        return stored, zero.to(torch.int8)

    def round(self, weight: Float[Tensor, "out in"], scale: Tensor, zero_point: Tensor | None) -> QTensor:
        """``weight`` on the grid of ``scale`` and ``zero_point``: half to even, in float32."""
        size = group_size_of(self.granularity)
        codes = round_to_codes(weight, scale.float(), size, self.low, self.high, zero_point)
        return QTensor(codes, scale, self.levels, zero_point, size)

    def quantize(self, weight: Float[Tensor, "out in"], importance: Float[Tensor, " in"] | None = None) -> QTensor:
        """Fit the grid and round to it."""
        return self.round(weight, *self.fit(weight, importance))
