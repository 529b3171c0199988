"""ARB-LLM RC: binary groups with a scale for each row and one for each column, refitted in turn.

As in BiLLM a block of columns has salient columns, which get two binary terms, and others, which get one; what is new
(arXiv:2410.03129) is that a group is ``row_i * column_j * sign_ij`` without a mean (sec. 3.4), that its parameters are
refitted, each in closed form given the others (algorithm 1), and that salient columns are split by magnitude, too: the
bitmap of groups has an idle bit there (column-group bitmap, sec. 3.5).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq.billm.binary import Rule
from bitnet.ptq.billm.checks import alive, check_scales
from bitnet.ptq.billm.published import Recipe, compensation, salient_columns, split_rest
from bitnet.ptq.billm.rowcolumn import RowColumnBinary
from bitnet.ptq.billm.stored import pack_bits
from bitnet.ptq.protocol import LayerStats, Statistic

RECIPE, RULE = Recipe(columns=(0, 49), means=False), Rule(means=False)


@dataclass(frozen=True, slots=True)
class Term:
    """``row * column * sign`` of both groups: float32 [2, out, 1] and [2, 1, n], bool [out, n]."""

    row: Float[Tensor, "2 out 1"]
    column: Float[Tensor, "2 1 n"]
    positive: Bool[Tensor, "out n"]

    def signed(self, members: Bool[Tensor, "2 out n"]) -> Float[Tensor, "2 out n"]:
        """-1 or +1 for the members of each group, 0 for others."""
        return torch.where(self.positive, 1.0, -1.0) * members

    def values(self, members: Bool[Tensor, "2 out n"]) -> Float[Tensor, "out n"]:
        return (self.row * self.column * self.signed(members)).sum(0)


def fit_rows(t: Tensor, term: Term, members: Tensor) -> Term:
    """``row = <column s, t> / <column s, column s>``, at least 0, in float16."""
    base = term.column * term.signed(members)
    return replace(term, row=_stored((base * t).sum(2, keepdim=True), base.square().sum(2, keepdim=True)))


def fit_columns(t: Tensor, term: Term, members: Tensor) -> Term:
    """``column = <row s, t> / <row s, row s>``, likewise."""
    base = term.row * term.signed(members)
    return replace(term, column=_stored((base * t).sum(1, keepdim=True), base.square().sum(1, keepdim=True)))


def fit_signs(t: Tensor, terms: list[Term], members: Tensor) -> list[Term]:
    """The nearest of the values that the scales allow: of two, or with two terms of four."""
    if len(terms) == 1:
        return [replace(terms[0], positive=t >= 0)]
    size = [(term.row * term.column * members).sum(0) for term in terms]
    larger = torch.maximum(size[0], size[1])  # its sign is that of t; the other one takes what is left
    swapped, first = size[1] > size[0], t >= 0
    second = t - torch.where(first, larger, -larger) >= 0
    return [
        replace(terms[0], positive=torch.where(swapped, second, first)),
        replace(terms[1], positive=torch.where(swapped, first, second)),
    ]


def alternate(t: Float[Tensor, "out n"], group: Bool[Tensor, "out n"], order: int, rounds: int) -> list[Term]:
    """``order`` terms, refitted ``rounds`` times. No step of a refit makes the squared error larger."""
    members = torch.stack([~group, group])
    terms: list[Term] = []
    rest = t
    for _ in range(order):
        row, column = t.new_zeros(2, len(t), 1), t.new_ones(2, 1, t.shape[1])
        terms.append(fit_columns(rest, fit_rows(rest, Term(row, column, rest >= 0), members), members))
        rest = rest - terms[-1].values(members)
    for _ in range(rounds):
        for k in range(order):
            for step in (fit_rows, fit_columns):
                others = sum((term.values(members) for i, term in enumerate(terms) if i != k), torch.zeros_like(t))
                terms[k] = step(t - others, terms[k], members)
        terms = fit_signs(t, terms, members)
    return terms


def _stored(along: Tensor, size: Tensor) -> Tensor:
    best = torch.where(size > 0, along / torch.where(size > 0, size, 1.0), 0.0)
    return best.clamp(0, torch.finfo(torch.float16).max).half().float()


@dataclass(frozen=True, slots=True, kw_only=True)
class ARBLLM:
    """Row and column scales for binary groups.

    Args:
        block_size: columns of a block.
        rounds: of refits.
        damping: share of the mean diagonal added to the Hessian.
    """

    block_size: int = 128
    rounds: int = 15
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.rounds < 0:
            raise InputError(f"block_size must be 1 or more and rounds 0 or more, got {self.block_size}, {self.rounds}")
        if not 0 < self.damping <= 1:
            raise InputError(f"damping must be above 0 and at most 1 (of the mean diagonal), got {self.damping}")

    @property
    def requires(self) -> frozenset[Statistic]:
        return frozenset([Statistic.HESSIAN])

    @property
    def claimed_bits(self) -> float:
        """One: the paper adds the share of salient columns, see the weight's own ``claimed_bits``."""
        return 1.0

    def quantize(self, weight: Float[Tensor, "out in"], stats: LayerStats | None) -> RowColumnBinary:
        """Quantize ``weight``, in float32.

        Raises:
            InputError: a weight is NaN or infinite, or too large for scales of float16.
        """
        assert stats is not None
        assert stats.hessian is not None
        working = alive(weight, stats.hessian.diagonal())
        upper = stats.inverse_factor(self.damping).upper
        blocks: list[tuple[Tensor, ...]] = []
        for begin in range(0, weight.shape[1], self.block_size):
            end = min(begin + self.block_size, weight.shape[1])
            own, factor = working[:, begin:end], upper[begin:end, begin:end]
            *block, values = binarize(own, self.rounds)
            working[:, end:] -= compensation(own - values, factor, upper[begin:end, end:], "block")
            blocks.append(tuple(block))
        signs, residual, group, salient, row, first, second = (
            torch.cat(each, -1) for each in zip(*blocks, strict=True)
        )
        check_scales(row.half(), advice="ptq=billm has scales of any size")
        return RowColumnBinary(
            pack_bits(signs),
            pack_bits(residual),
            pack_bits(group),
            pack_bits(salient),
            row.half(),
            torch.cat([first, second], 1).half(),
            weight.shape[0],
            weight.shape[1],
            self.block_size,
        )


def binarize(own: Float[Tensor, "out n"], rounds: int) -> tuple[Tensor, ...]:
    """One block: signs, residual signs, groups, salient columns, scales as they are stored, and the values."""
    salient = salient_columns(own, RECIPE, RULE)
    signs, group, values = own >= 0, torch.zeros_like(own, dtype=torch.bool), torch.zeros_like(own)
    row, first = own.new_zeros(3, 2, len(own), 1), own.new_zeros(2, own.shape[1])
    second, residual = own.new_zeros(2, 0), signs[:, :0]
    for columns, order in ((~salient, 1), (salient, 2)):
        part = own[:, columns]
        if not part.shape[1]:
            continue
        above = split_rest(part, torch.zeros_like(columns[columns]), RECIPE, RULE)
        terms = alternate(part, above, order, rounds)
        members = torch.stack([~above, above])
        group[:, columns], signs[:, columns], first[:, columns] = above, terms[0].positive, terms[0].column[:, 0]
        values[:, columns] = sum((term.values(members) for term in terms[1:]), terms[0].values(members))
        row[order - 1] = terms[0].row
        if order == 2:
            row[2], second, residual = terms[1].row, terms[1].column[:, 0], terms[1].positive
    return signs, residual, group, salient, row, first, second, values
