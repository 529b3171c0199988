"""Binary approximation of the members of a group, row by row: ``mean + scale * sign``, once or twice.

First order, for members t of a group in one row: mean mu, scale ``a = mean|t - mu|``, value ``mu + a sign(t - mu)``.
Second order: the first order of t, plus the first order of what it leaves. Refits in the manner of ARB-LLM repeat, each
in closed form given the others: ``mu += mean(t - value)``, ``a = <s, t - mu> / <s, s>``, ``s = sign(t - mu)``.

Means and scales are rounded to the dtype they are stored in before a residual or an error is computed from them.
Sources: BiLLM, arXiv:2402.04291, eq. 4-7; ARB-LLM, arXiv:2410.03129, algorithm 1.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Binary:
    """``mean + scale * sign`` of the members of a group; the other entries are no part of it.

    Attributes:
        mean: float32 [out, 1].
        scale: float32 [out, 1].
        sign: -1, +1, or 0 where an entry equals the mean exactly and zeros are kept; float32 [out, n].
        members: bool [out, n].
    """

    mean: Float[Tensor, "out 1"]
    scale: Float[Tensor, "out 1"]
    sign: Float[Tensor, "out n"]
    members: Bool[Tensor, "out n"]

    @property
    def values(self) -> Float[Tensor, "out n"]:
        """0 outside of the group."""
        return (self.mean + self.scale * self.sign) * self.members


@dataclass(frozen=True, slots=True)
class Rule:
    """How groups are binarized.

    Args:
        means: subtract the mean of a group; else it is 0.
        third_level: sign(0) is 0, as in the published code; else +1.
        dtype: what means and scales are stored in; None: nothing is rounded.
    """

    means: bool = True
    third_level: bool = False
    dtype: torch.dtype | None = None

    def stored(self, numbers: Tensor) -> Tensor:
        return numbers if self.dtype is None else numbers.to(self.dtype).to(numbers.dtype)

    def sign(self, x: Tensor) -> Tensor:
        return x.sign() if self.third_level else torch.where(x >= 0, 1.0, -1.0)


def first_order(t: Float[Tensor, "out n"], members: Bool[Tensor, "out n"], rule: Rule) -> Binary:
    """Binarize the members of each row; a row without members has mean and scale 0."""
    count = members.sum(1, keepdim=True).clamp(min=1)
    mean = (t * members).sum(1, keepdim=True) / count if rule.means else torch.zeros_like(t[:, :1])
    centred = (t - mean) * members
    scale = centred.abs().sum(1, keepdim=True) / count
    sign = rule.sign(centred).masked_fill(scale == 0, 1.0)  # a lone member is its mean: no third level
    return Binary(rule.stored(mean), rule.stored(scale), sign, members)


def approximate(t: Float[Tensor, "out n"], members: Bool[Tensor, "out n"], order: int, rule: Rule) -> list[Binary]:
    """``order`` binary terms, each the first order of what those before it leave."""
    terms: list[Binary] = []
    rest = t
    for _ in range(order):
        terms.append(first_order(rest, members, rule))
        rest = rest - terms[-1].values
    return terms


def values(terms: list[Binary]) -> Float[Tensor, "out n"]:
    """The sum of the terms, first to last."""
    total = terms[0].values
    for term in terms[1:]:
        total = total + term.values
    return total


def refit(t: Float[Tensor, "out n"], terms: list[Binary], rule: Rule, rounds: int) -> list[Binary]:
    """Refit mean, scale and signs of each term in turn, ``rounds`` times; the squared error of no row ever grows.

    That holds for stored dtypes, too: the error is a parabola in each number, and no other number of the dtype is
    nearer to its lowest point than the one it is rounded to.
    """
    terms = list(terms)
    for _ in range(rounds):
        for k, term in enumerate(terms):
            rest = t - values(terms) + term.values
            for step in STEPS:
                term = step(rest, term, rule)
            terms[k] = term
    return terms


def _refit_mean(t: Tensor, term: Binary, rule: Rule) -> Binary:
    if not rule.means:
        return term
    count = term.members.sum(1, keepdim=True).clamp(min=1)
    left = ((t - term.values) * term.members).sum(1, keepdim=True)
    return replace(term, mean=rule.stored(term.mean + left / count))


def _refit_scale(t: Tensor, term: Binary, rule: Rule) -> Binary:
    signs = term.sign * term.members
    along = (signs * (t - term.mean)).sum(1, keepdim=True) / signs.square().sum(1, keepdim=True).clamp(min=1)
    return replace(term, scale=rule.stored(along.clamp(min=0)))


def _refit_signs(t: Tensor, term: Binary, rule: Rule) -> Binary:
    return replace(term, sign=rule.sign((t - term.mean) * term.members))


STEPS = (_refit_mean, _refit_scale, _refit_signs)
