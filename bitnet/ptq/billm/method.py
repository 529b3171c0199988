"""The method: BiLLM as the paper has it, as its code has it, refined in the same bytes, or in binary planes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq.billm.checks import alive, check_scales
from bitnet.ptq.billm.ours import quantize_to_planes
from bitnet.ptq.billm.planes import MOST_PLANES, PlaneWeight
from bitnet.ptq.billm.published import OFFICIAL, PAPER, REFINED, Recipe, binarize
from bitnet.ptq.billm.stored import BlockBinary
from bitnet.ptq.gptq import corrected_target
from bitnet.ptq.protocol import LayerStats, Statistic
from bitnet.quant.grid import SCALE_DTYPES

RECIPES = {"paper": PAPER, "official": OFFICIAL, "refined": REFINED}


@dataclass(frozen=True, slots=True, kw_only=True)
class BiLLM:
    """Binary weights with structure by columns.

    Args:
        variant: "ours" (binary planes), "official", "paper" or "refined" (three recipes for the published format).
        bits: of ours: stored bits a weight, everything counted, 1 to 5. The published format takes what it takes.
        damping: share of the mean diagonal added to the Hessian.
        correction: 0 to 1, how far the target moves towards what the full-precision inputs would have given.
        sweeps: of ours: rounds of refinement.
        block_size: of the published format: columns of a block.
        quirks: of the published format: parameters of `bitnet.ptq.billm.published.Recipe` to change, and
            ``scale_dtype`` (float16) for means and scales.
    """

    variant: str = "ours"
    bits: float = 2.25
    damping: float = 0.01
    correction: float = 0.0
    sweeps: int = 4
    block_size: int = 128
    quirks: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.variant != "ours" and self.variant not in RECIPES:
            raise InputError(f"variant must be one of ours, {', '.join(RECIPES)}, got {self.variant!r}")
        if not 1 <= self.bits <= MOST_PLANES:
            raise InputError(f"bits must be 1 to {MOST_PLANES}, got {self.bits}")
        if not 0 < self.damping <= 1:
            raise InputError(f"damping must be above 0 and at most 1 (of the mean diagonal), got {self.damping}")
        if not 0 <= self.correction <= 1:
            raise InputError(f"correction must be between 0 (off) and 1, got {self.correction}")
        if self.sweeps < 0 or self.block_size < 1:
            raise InputError(f"sweeps must be 0 or more and block_size 1 or more, got {self.sweeps}, {self.block_size}")
        if self.variant == "ours" and self.quirks:
            raise InputError("quirks belong to the published format: choose variant=official, paper or refined")
        if self.variant != "ours":
            self._recipe()

    @property
    def requires(self) -> frozenset[Statistic]:
        return frozenset([Statistic.HESSIAN] + [Statistic.CROSS] * (self.correction > 0))

    @property
    def claimed_bits(self) -> float:
        """Of ours, the stored bits; of the published format, one: the paper adds the share of salient columns."""
        return self.bits if self.variant == "ours" else 1.0

    def quantize(self, weight: Float[Tensor, "out in"], stats: LayerStats | None) -> PlaneWeight | BlockBinary:
        """Quantize ``weight``, in float32.

        Raises:
            InputError: a weight is NaN or infinite, or too large for scales of their dtype.
        """
        assert stats is not None
        assert stats.hessian is not None
        diagonal = stats.hessian.diagonal()
        order = diagonal.argsort(descending=True, stable=True) if self.variant == "ours" else None
        factor = stats.inverse_factor(self.damping, order, key="" if order is None else "activation")
        target = alive(weight, diagonal)
        if self.correction:
            assert stats.cross is not None
            target = corrected_target(target, stats.cross, factor.upper, order, self.correction)
            target = target.masked_fill(diagonal == 0, 0.0)
        if order is None:
            recipe, dtype = self._recipe()
            blocks = binarize(target, factor.upper, self.block_size, recipe, dtype)
            result = BlockBinary.from_blocks(blocks, self.block_size, dtype, recipe.means)
            means = [] if result.mean is None else [result.mean]
            check_scales(result.scale, *means, advice="set quirks.scale_dtype to bfloat16 or float32")
            return result
        hessian = damped(stats.hessian, factor.damping)
        return quantize_to_planes(target, hessian, factor.upper, order, self.bits, self.sweeps)

    def _recipe(self) -> tuple[Recipe, torch.dtype]:
        quirks = dict(self.quirks)
        dtype = quirks.pop("scale_dtype", "float16")
        if dtype not in SCALE_DTYPES:
            raise InputError(f"quirks.scale_dtype must be one of {', '.join(SCALE_DTYPES)}, got {dtype!r}")
        recipe = RECIPES[self.variant]
        known = asdict(recipe)
        if unknown := sorted(set(quirks) - set(known)):
            raise InputError(f"quirks has no {', '.join(unknown)}: it has scale_dtype, {', '.join(known)}")
        if "columns" in quirks:
            quirks["columns"] = tuple(quirks["columns"])
        return replace(recipe, **quirks), SCALE_DTYPES[dtype]


def damped(hessian: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """The Hessian that was factored: a share of the mean diagonal added, dead inputs with a 1."""
    out = hessian.float().clone()
    dead = out.diagonal() == 0
    out.diagonal().add_(damping * (float(hessian.diagonal().double().mean()) or 1.0))
    out.diagonal()[dead] = 1.0
    return out
