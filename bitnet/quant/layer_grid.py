"""The grid that the quantizer of a trained layer rounds to, as something that codes and a scale can be chosen on.

A quantizer of `bitnet.nn.BitLinear` is a function from the latent weight to codes and a scale. To begin from codes that
were found otherwise (by least squares, by error compensation) one has to know what it can answer: which codes, what
shares a scale, and what the scale is made of.

    quantizer           codes                       scale
    centred_sign        -1, +1                      mean magnitude
    absmean_ternary     -1, 0, +1                   mean magnitude
    SEQ                 -1, 0, +1; -3, -1, +1, +3   learned
    LSQ                 -2^(b-1) ... 2^(b-1) - 1    learned
    Grid, symmetric     -h ... h, h = 2^(b-1) - 1   largest magnitude / h, rounded to 16 bits

Every scale above zero can be had: a learned one is set, and a mean or a maximum is that of the latent weights, whose
place inside their cells is free (`bitnet.quant.latent`).
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.quant.absmean import absmean_ternary
from bitnet.quant.grid import Grid
from bitnet.quant.grouping import Granularity, group_size_of, grouped, per_column
from bitnet.quant.learned import FLOOR, LSQ, SEQ, LearnedScale
from bitnet.quant.sign import centred_sign
from bitnet.quant.statistics import mean_magnitude

COARSE = tuple(0.82**n for n in range(1, 24))  # shares of the covering scale that are tried, beside 1: to 0.01
REFITS = 6  # least-squares scales of the codes there are, codes anew: each lowers the error, or ends it


@dataclass(frozen=True, slots=True)
class LayerGrid:
    """Codes ``low`` ... ``high`` times a positive scale.

    Attributes:
        low, high: the smallest and the largest code.
        odd: the codes are the odd numbers between them, so that ``scale`` is half a step.
        granularity: what shares a scale.
        scale_from: "parameter", "mean" or "maximum": what the quantizer takes the scale from.
        floor: the smallest scale.
        scale_dtype: that the scale is rounded to.
    """

    low: int
    high: int
    odd: bool
    granularity: Granularity
    scale_from: str
    floor: float
    scale_dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, quantizer: Any) -> "LayerGrid":
        """The grid of a layer's quantizer, or of the rule of a learned scale.

        Raises:
            InputError: a quantizer whose scale the latent weights cannot be arranged for.
        """
        rule = quantizer.rule if isinstance(quantizer, LearnedScale) else quantizer
        if isinstance(rule, SEQ) and rule.odd:
            return cls(-3, 3, True, rule.granularity, "parameter", FLOOR)
        if isinstance(rule, LSQ | SEQ):
            low, high = (-1, 1) if isinstance(rule, SEQ) else (int(end) for end in rule.bounds)
            return cls(low, high, False, rule.granularity, "parameter", FLOOR)
        if isinstance(rule, Grid):
            return cls._of_grid(rule)
        function, options = getattr(rule, "func", rule), getattr(rule, "keywords", {})
        if function not in (absmean_ternary, centred_sign):
            name = getattr(function, "__name__", type(function).__name__)
            raise InputError(
                f"init= knows the grids of absmean, sign, lsq, seq, int4 and int8, got the quantizer {name}: set "
                "init=none"
            )
        defaults = {key: each.default for key, each in inspect.signature(function).parameters.items()}
        options = defaults | options
        odd = function is centred_sign
        return cls(-1, 1, odd, options["granularity"], "mean", options["eps"])

    @classmethod
    def _of_grid(cls, grid: Grid) -> "LayerGrid":
        if not grid.symmetric:
            raise InputError("init= arranges latent weights around zero: set quantizer.symmetric=true, or init=none")
        if grid.range != "minmax":
            raise InputError(
                "init= sets the largest weight of a group to where its scale is to end, and quantizer.range="
                f"{grid.range} would move it: set quantizer.range=minmax (init=mse clips by itself), or init=none"
            )
        floor = 1e-5 / (grid.levels - 1)
        return cls(grid.low, grid.high, False, grid.granularity, "maximum", floor, grid.codes.scale_dtype)

    @property
    def half(self) -> float:
        """Half the width of a cell, in units of the scale."""
        return 1.0 if self.odd else 0.5

    def nearest(self, units: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """The codes, as floats, nearest to values in units of the scale; half to even."""
        if not self.odd:
            return units.round().clamp_(self.low, self.high)
        return units.mul(0.5).sub_(0.5).round_().clamp_((self.low - 1) // 2, (self.high - 1) // 2).mul_(2).add_(1)

    def stored(self, scale: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """The nearest scale that the quantizer can have, in the dtype of ``scale``."""
        smallest = torch.finfo(self.scale_dtype).smallest_normal * torch.finfo(self.scale_dtype).eps
        return scale.clamp(min=self.floor).to(self.scale_dtype).clamp(min=smallest).to(scale.dtype)

    def columns(self, scale: Float[Tensor, "rows groups"], count: int) -> Float[Tensor, "rows cols"]:
        """One scale for each of ``count`` columns; a single one where a whole row shares it."""
        size = group_size_of(self.granularity)
        return scale if size is None else per_column(scale, size, count)

    def covering(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "rows groups"]:
        """The smallest scale that clips nothing."""
        return grouped(weight.float(), self.granularity).abs().amax(-1) / (self.high + (1 if self.odd else 0))

    def fit(
        self, weight: Float[Tensor, "out in"], importance: Float[Tensor, " in"] | None = None
    ) -> Float[Tensor, "rows groups"]:
        """The scale of least squared error, for each by itself: the best of 25, then refitted in closed form.

        Args:
            weight: the values to come near.
            importance: weight of each column's squared error; None: all equal.
        """
        weight = weight.float()
        counts = torch.ones_like(weight[:1]) if importance is None else importance.float()[None]
        values, counts = grouped(weight, self.granularity), grouped(counts.expand_as(weight), self.granularity)
        covering = self.covering(weight)
        best = self.stored(covering)
        least, codes = self._error(values, counts, best)
        mean = mean_magnitude(weight, self.granularity)
        if self.scale_from == "maximum":  # a scale above the covering one would leave the outer codes unused
            mean = torch.minimum(mean, covering)
        for candidate in (*(covering * share for share in COARSE), mean):
            best, least, codes = self._better(values, counts, candidate, (best, least, codes))
        for _ in range(REFITS):
            weighted = codes * counts
            square = (weighted * codes).sum(-1)
            fitted = torch.where(square > 0, (weighted * values).sum(-1) / square, best)
            if self.scale_from == "maximum":
                fitted = torch.minimum(fitted, covering)
            before = best
            best, least, codes = self._better(values, counts, fitted, (best, least, codes))
            if torch.equal(before, best):
                break
        return best

    def _better(
        self, values: Tensor, counts: Tensor, scale: Tensor, best: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale = self.stored(scale)
        error, codes = self._error(values, counts, scale)
        won = error < best[1]
        return (
            torch.where(won, scale, best[0]),
            torch.minimum(error, best[1]),
            torch.where(won[..., None], codes, best[2]),
        )

    def _error(self, values: Tensor, counts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.nearest(values / scale[..., None])
        return ((codes * scale[..., None] - values).square_() * counts).sum(-1), codes
