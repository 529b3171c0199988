"""Rounding to nearest: every weight by itself, the baseline that other methods are measured against."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq.protocol import LayerStats, Statistic
from bitnet.quant import Granularity, QTensor
from bitnet.quant.grid import Grid


@dataclass(frozen=True, slots=True)
class RoundToNearest:
    """Fit a uniform grid to the weights and round each to its nearest value.

    Symmetric and with the full range it is absmax quantization, asymmetric it is zero-point quantization.

    Args:
        symmetric: 2^bits - 1 codes around 0 without a zero point; else 2^bits codes with one.
        bits: 2 to 8; or 1.58 for ternary codes (symmetric).
        granularity: "tensor", "row" or a group size: what shares a scale.
        range: "minmax", "percentile", "mse", "entropy" or "absmean"; see `bitnet.quant.grid.Grid`.
        scale_dtype: "float16", "bfloat16" or "float32".
        percentile: share of the values that range percentile covers, in percent.
        norm: exponent of the error that range mse minimises.
        importance: weigh the errors of range mse by each input's mean square, which needs calibration.

    Raises:
        InputError: options that do not fit.
    """

    symmetric: bool
    bits: float = 4
    granularity: Granularity = 128
    range: str = "minmax"
    scale_dtype: str = "float16"
    percentile: float = 99.9
    norm: float = 2.0
    importance: bool = False

    def __post_init__(self) -> None:
        self._grid  # noqa: B018  # raises for options that do not fit
        if self.importance and self.range != "mse":
            raise InputError(f"importance weighs the errors that range=mse compares, got range={self.range}")

    @property
    def _grid(self) -> Grid:
        return Grid(
            self.bits,
            self.symmetric,
            self.granularity,
            self.range,
            self.scale_dtype,
            percentile=self.percentile,
            norm=self.norm,
        )

    @property
    def requires(self) -> frozenset[Statistic]:
        return frozenset({Statistic.MEAN_SQUARE} if self.importance else ())

    @property
    def claimed_bits(self) -> float:
        return self.bits

    def quantize(self, weight: Float[Tensor, "out in"], stats: LayerStats | None) -> QTensor:
        """Codes, scales and zero points; float32 arithmetic, half to even.

        Raises:
            InputError: a weight is NaN or infinite, or a scale is too large for its dtype.
        """
        if not bool(torch.isfinite(weight).all()):
            raise InputError("the weight holds NaN or infinity: check the checkpoint")
        importance = None
        if self.importance:
            assert stats is not None, "the driver collects what the method requires"
            assert stats.mean_square is not None
            importance = stats.mean_square
        quantized = self._grid.quantize(weight, importance)
        if not bool(torch.isfinite(quantized.scale).all()):
            raise InputError(f"the weights are too large for scales in {self.scale_dtype}: set scale_dtype to bfloat16")
        return quantized
