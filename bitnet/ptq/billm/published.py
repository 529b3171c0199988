"""BiLLM as published, block of columns by block, and every point at which paper, code and a better recipe differ.

For each block of an already compensated weight (arXiv:2402.04291, algorithm 1):

1. rank its columns by saliency, ``sum over rows of w_ij^2 / U_jj^2``;
2. choose how many of them are salient: those get a second-order approximation, the rest a first-order one;
3. choose the magnitude at which the rest is split into a sparse and a dense group, binarized each by itself;
4. binarize, and let the columns that follow compensate for the error.

What `Recipe` names are the differences. ``OFFICIAL`` is what the published code does, ``PAPER`` what the paper says,
and ``REFINED`` what is best in the same storage: all searches on the weights by the error that they cause, exact
compensation, and alternating refits.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq.billm.binary import Binary, Rule, approximate, first_order, refit, values

SPLITS = ("percentile", "fraction")
SEARCHES = ("saliency", "weights")
COMPENSATIONS = ("diagonal", "block")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The points of difference.

    Args:
        search: what the two searches binarize, and what columns are ranked by: the "saliency" or the "weights".
        columns: smallest and largest number of salient columns that is tried; fewer where a block is narrower.
        rest_order: terms that stand for the rest while salient columns are counted (in the result it is one a group).
        means: a mean per row and group.
        split: thresholds at 81 "percentile"s, 10 to 90 %, of the magnitudes with salient entries as zeros; or at 81
            "fraction"s, 0.1 to 0.9, of the largest magnitude of the rest.
        compensation: "diagonal" divides the block's error by diag(U), as if every column were alone; "block" solves
            ``E U_bb = W_b - Q_b``, which is exact for columns that are quantized at once.
        third_level: sign(0) = 0.
        refits: rounds of alternating refits of means, scales and signs.
    """

    search: str = "weights"
    columns: tuple[int, int] = (1, 49)
    rest_order: int = 1
    means: bool = True
    split: str = "percentile"
    compensation: str = "block"
    third_level: bool = False
    refits: int = 0

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("search", self.search, SEARCHES),
            ("split", self.split, SPLITS),
            ("compensation", self.compensation, COMPENSATIONS),
            ("rest_order", self.rest_order, (1, 2)),
        ):
            if value not in choices:
                raise InputError(f"quirks.{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        if len(self.columns) != 2 or not 0 <= self.columns[0] <= self.columns[1]:
            raise InputError(f"quirks.columns must be the smallest and the largest count, got {self.columns}")
        if self.refits < 0:
            raise InputError(f"quirks.refits must be 0 or more, got {self.refits}")


OFFICIAL = Recipe(search="saliency", rest_order=2, compensation="diagonal", third_level=True)
PAPER = Recipe(columns=(3, 30), means=False, split="fraction")
REFINED = Recipe(columns=(0, 49), refits=15)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of columns: which group each weight is in, and the four terms.

    ``sparse`` and ``dense`` are terms of the rest, ``first`` and ``second`` of the salient columns.
    """

    salient: Bool[Tensor, " n"]
    sparse: Binary
    dense: Binary
    first: Binary
    second: Binary

    @property
    def terms(self) -> tuple[Binary, Binary, Binary, Binary]:
        return self.sparse, self.dense, self.first, self.second

    @property
    def values(self) -> Float[Tensor, "out n"]:
        return values(list(self.terms))


def binarize(
    weight: Float[Tensor, "out in"],
    upper: Float[Tensor, "in in"],
    block_size: int,
    recipe: Recipe,
    dtype: torch.dtype | None,
) -> list[Block]:
    """The blocks of ``weight``, first to last, the last one maybe narrower.

    Args:
        weight: float32; not changed.
        upper: U of ``H^-1 = U^T U``.
        block_size: columns of a block.
        recipe: the points of difference.
        dtype: means and scales are rounded to it; None: not at all.
    """
    working = weight.clone()
    blocks: list[Block] = []
    for begin in range(0, weight.shape[1], block_size):
        end = min(begin + block_size, weight.shape[1])
        own, factor = working[:, begin:end], upper[begin:end, begin:end]
        blocks.append(binarize_block(own, factor.diagonal(), recipe, dtype))
        difference = own - blocks[-1].values
        working[:, end:] -= compensation(difference, factor, upper[begin:end, end:], recipe.compensation)
    return blocks


def compensation(
    difference: Float[Tensor, "out n"], own: Float[Tensor, "n n"], later: Float[Tensor, "n rest"], kind: str
) -> Float[Tensor, "out rest"]:
    """What to take from the columns that follow a block, so that they make up for its error W_b - Q_b.

    Args:
        difference: W_b - Q_b.
        own: the block of U on the diagonal.
        later: the block of U to the right of it.
        kind: "block": the least-squares optimum; "diagonal": the published code's.
    """
    if kind == "diagonal":
        return difference / own.diagonal() @ later
    return torch.linalg.solve_triangular(own, difference, upper=True, left=False) @ later


def binarize_block(
    weight: Float[Tensor, "out n"], diagonal: Float[Tensor, " n"], recipe: Recipe, dtype: torch.dtype | None
) -> Block:
    """Search on what the recipe says, binarize the weights."""
    searched = weight.square() / diagonal.square() if recipe.search == "saliency" else weight
    rule = Rule(recipe.means, recipe.third_level)
    salient = salient_columns(searched, recipe, rule)
    sparse = split_rest(searched, salient, recipe, rule)
    return _terms(weight, salient, sparse, recipe.refits, Rule(recipe.means, recipe.third_level, dtype))


def salient_columns(x: Float[Tensor, "out n"], recipe: Recipe, rule: Rule) -> Bool[Tensor, " n"]:
    """The columns of largest sum, as many as give the smallest error; ties go to fewer columns."""
    ranked = x.abs().sum(0).argsort(descending=True, stable=True)
    most = min(recipe.columns[1], max(x.shape[1] - 1, 0))
    errors = [_error_of(x, ranked[:count], recipe, rule) for count in range(min(recipe.columns[0], most), most + 1)]
    count = min(recipe.columns[0], most) + int(torch.stack(errors).argmin())
    return torch.zeros(x.shape[1], dtype=torch.bool, device=x.device).index_fill_(0, ranked[:count], True)


def split_rest(
    x: Float[Tensor, "out n"], salient: Bool[Tensor, " n"], recipe: Recipe, rule: Rule
) -> Bool[Tensor, "out n"]:
    """Members of the sparse group: what is above the threshold of smallest error."""
    rest = (~salient).expand_as(x)
    magnitude = x.abs() * rest
    grid = torch.linspace(0.1, 0.9, 81, device=x.device)
    thresholds = torch.quantile(magnitude, grid) if recipe.split == "percentile" else grid * magnitude.max()
    errors = [_split_error(x, rest & (magnitude > p), rest & (magnitude <= p), rule) for p in thresholds]
    return rest & (magnitude > thresholds[torch.stack(errors).argmin()])


def _error_of(x: Tensor, columns: Tensor, recipe: Recipe, rule: Rule) -> Tensor:
    salient = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device).index_fill_(0, columns, True).expand_as(x)
    kept = values(approximate(x, salient, 2, rule)) + values(approximate(x, ~salient, recipe.rest_order, rule))
    return (x - kept).square().sum()


def _split_error(x: Tensor, sparse: Tensor, dense: Tensor, rule: Rule) -> Tensor:
    kept = first_order(x, sparse, rule).values + first_order(x, dense, rule).values
    return ((x - kept) * (sparse | dense)).square().sum()


def _terms(weight: Tensor, salient: Tensor, sparse: Tensor, refits: int, rule: Rule) -> Block:
    high = salient.expand_as(weight)
    groups = [
        approximate(weight, members, order, rule) for members, order in ((sparse, 1), (~sparse & ~high, 1), (high, 2))
    ]
    (one,), (two,), (first, second) = (refit(weight, group, rule, refits) for group in groups)
    return Block(salient, one, two, first, second)
