"""Which part of the values' range a uniform grid covers: (low, high), always around 0.0.

A wide range represents every value and rounds all of them coarsely; a narrow one clips the few largest and rounds the
rest finely. Each rule here reads a set of values (the last dimension) and answers for each set by itself.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError

RangeRule = Callable[[Tensor, Tensor | None, int, bool], tuple[Tensor, Tensor]]
"""(values [*sets, n], importance [n] or [*sets, n] or None, levels, symmetric) -> low and high [*sets], float32"""


def min_max(
    values: Float[Tensor, "*sets n"], importance: Tensor | None, levels: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Every value: low = min, high = max (symmetric: -max|x|, max|x|), widened to include 0.0."""
    if symmetric:
        high = values.abs().amax(-1)
        return -high, high
    return values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)


def mean_magnitude(
    values: Float[Tensor, "*sets n"], importance: Tensor | None, levels: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """-mean|x| to mean|x|: BitNet b1.58's range for the three levels of a ternary grid.

    Raises:
        InputError: another number of levels, for which it would clip most values.
    """
    if levels != 3:
        raise InputError(f"range absmean is for ternary weights (3 levels), got {levels} levels: use mse or minmax")
    high = values.abs().mean(-1)
    return -high, high


RULES: dict[str, RangeRule] = {"minmax": min_max, "absmean": mean_magnitude}


def range_rule(name: str) -> RangeRule:
    """The rule of that name.

    Raises:
        InputError: there is none.
    """
    if name not in RULES:
        raise InputError(f"range must be one of {', '.join(RULES)}, got {name!r}")
    return RULES[name]
