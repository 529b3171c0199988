"""Static activations: a range chosen once, from the histogram of a calibration text, and kept from then on.

The dynamic quantizers (`absmax`, `zero_point`) read the range of every token when it comes. A static one costs nothing
at run time and clips what lies outside. Its range is one for all tokens and features: a scale a feature could not be
taken out of the product of codes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.quant.absmax import check_bits
from bitnet.quant.histogram import Histogram
from bitnet.quant.ranges import Codes, Sample, range_rule
from bitnet.quant.rounding import round_to_codes
from bitnet.quant.types import QTensor


@dataclass(frozen=True, slots=True)
class StaticActivation:
    """How to quantize a layer's inputs once a histogram of them is there. Told from a `Quantizer` by ``calibrated``.

    Args:
        bits: 2 to 8.
        symmetric: 2^bits - 1 codes without a zero point; else 2^bits codes with one.
        range: "minmax", "percentile", "mse" or "entropy"; see `bitnet.quant.ranges`.
        percentile: share of the values that range percentile covers, in percent.
        norm: exponent of the error that range mse minimises.

    Raises:
        InputError: options that do not fit.
    """

    bits: int = 8
    symmetric: bool = False
    range: str = "minmax"
    percentile: float | int = 99.9
    norm: float | int = 2.0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        range_rule(self.range, percent=self.percentile, norm=self.norm)
        if self.range == "absmean":
            raise InputError("range absmean is for ternary weights: for activations choose minmax, percentile or mse")

    def calibrated(self, histogram: Histogram) -> "FixedRange":
        """The quantizer with the range of these values.

        Raises:
            InputError: the histogram is empty.
        """
        codes = Codes(2**self.bits - (1 if self.symmetric else 0), self.symmetric)
        rule = range_rule(self.range, percent=self.percentile, norm=self.norm)
        return FixedRange(codes.levels, *codes.parameters(*rule(Sample.of_histogram(histogram), codes)))

    def restored(self, state: Mapping[str, Tensor]) -> "FixedRange":
        """The quantizer that had this ``state_dict``."""
        return FixedRange(2**self.bits - (1 if self.symmetric else 0), state["scale"], state.get("zero_point"))


class FixedRange(nn.Module):
    """Quantizer of inputs [*rows, in] with one scale and zero point, both buffers: they are saved with a model.

    Their dtypes stay: ``model.bfloat16()`` changes neither.

    Args:
        levels: how many codes.
        scale: multiplier, float32, one number.
        zero_point: the code of 0.0, int8, one number; None where it is code 0.
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, levels: int, scale: Tensor, zero_point: Tensor | None = None) -> None:
        super().__init__()
        if scale.numel() != 1 or not bool(torch.isfinite(scale) & (scale > 0)):
            raise InputError(f"a fixed range has one positive, finite scale, got {scale.tolist()}")
        self.levels = levels
        self.register_buffer("scale", scale.float().reshape(()))
        self.register_buffer("zero_point", None if zero_point is None else zero_point.reshape(()))

    def forward(self, x: Float[Tensor, "*rows cols"]) -> QTensor:
        """Codes of ``x``; float32, half to even, values beyond the range clamped to its ends.

        A NaN or infinity in ``x`` is not lost in the clamp: it makes the scale NaN, and with it every value.
        """
        x, low = x.detach(), -(self.levels // 2)
        ones = (1,) * x.dim()
        scale = torch.where(torch.isfinite(x).all(), self.scale, torch.nan).reshape(ones)
        zero = None if self.zero_point is None else self.zero_point.reshape(ones)
        codes = round_to_codes(x, self.scale.reshape(ones), None, low, low + self.levels - 1, zero)
        return QTensor(codes, scale, self.levels, zero)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedRange":
        """Move like any module, but keep the scale in float32."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        zero = "" if self.zero_point is None else f", zero_point={int(self.zero_point)}"
        return f"levels={self.levels}, scale={float(self.scale):.4g}{zero}"
