"""Scales and codes of binary planes, refined one at a time; each step can only lower ``tr(D H D^T)``, D = W - Q.

Every step is the closed-form minimum over what it changes, all else given:

- a row's scale r: the error is ``r^2 <q, H q> - 2 r <w, H q> + ...``; the minimum, moved to the grid of stored scales;
- a column: the error is ``H_jj ||t - q_j||^2 + ...`` with ``t = q_j + (H D)_j / H_jj``. First its scale for the codes
  there are (moved to its grid), then the codes nearest to t.

This is the alternation of ARB-LLM's row and column scales (arXiv:2410.03129, sec. 3.4) in the metric of the inputs
instead of the weights, and with codes of several bits. Everything is transposed, [in, out], so that a column is
contiguous. H Q is kept up to date: a change of rows scales it, a block of changed columns is one matrix product.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bitnet.ptq.billm.planes import MOST_PLANES, ScaleGrid, levels

BLOCK = 64  # columns that update each other one by one before one product tells the rest


@dataclass
class Planes:
    """The working state: columns of a weight on their grids. ``round`` and ``fit`` are what `compensate` asks for."""

    orders: list[int]
    row_grid: ScaleGrid
    column_grid: ScaleGrid
    row: Float[Tensor, " out"]
    column: Float[Tensor, " in"]
    codes: UInt8[Tensor, "in out"]

    def __post_init__(self) -> None:
        self._levels = [levels(order).to(self.codes.device) for order in range(MOST_PLANES + 1)]
        self._middles = [(each[1:] + each[:-1]) / 2 for each in self._levels]

    @property
    def span(self) -> None:
        return None

    def fit(self, start: int, columns: Float[Tensor, "span out"]) -> None:
        """Scales are chosen beforehand."""

    def round(self, column: Float[Tensor, " out"], index: int) -> Float[Tensor, " out"]:
        """The nearest values to column ``index``; their codes are kept."""
        scale = self.column[index] * self.row
        order = self.orders[index]
        codes = torch.bucketize(column / scale, self._middles[order], out_int32=True)
        self.codes[index] = codes
        return self._levels[order].index_select(0, codes).mul_(self.row).mul_(self.column[index])

    def improve(self, target: Tensor, present: Tensor, index: int) -> Float[Tensor, " out"]:
        """Column ``index`` nearest to ``target``: its scale for the codes that give ``present``, then its codes."""
        along, size = torch.dot(target, present), torch.dot(present, present)
        best = self.column_grid.nearest(self.column[index] * along / size)
        self.column[index] = torch.where(size > 0, best, self.column[index])
        return self.round(target, index)


def refine_rows(
    planes: Planes,
    values: Float[Tensor, "in out"],
    wanted: Float[Tensor, "in out"],
    given: Float[Tensor, "in out"],
) -> None:
    """Choose every row's scale for its codes; changes ``planes``, ``values`` (Q) and ``given`` (H Q).

    Args:
        planes: the scales.
        values: Q, transposed.
        wanted: H W, transposed.
        given: H Q, transposed.
    """
    along, size = (values * wanted).sum(0), (values * given).sum(0)
    alive = (size > 0) & (planes.row > 0)
    new = planes.row_grid.nearest(torch.where(alive, planes.row * along / size, planes.row))
    ratio = torch.where(alive, new / planes.row, 1.0)
    planes.row = new
    values *= ratio
    given *= ratio


def refine_columns(
    planes: Planes,
    values: Float[Tensor, "in out"],
    wanted: Float[Tensor, "in out"],
    given: Float[Tensor, "in out"],
    hessian: Float[Tensor, "in in"],
) -> None:
    """Choose every column's codes and scale, given all others; changes ``planes``, ``values`` and ``given``."""
    diagonal = hessian.diagonal().tolist()
    for begin in range(0, len(values), BLOCK):
        end = min(begin + BLOCK, len(values))
        before = values[begin:end].clone()
        gradient = wanted[begin:end] - given[begin:end]
        for j in range(begin, end):
            if planes.orders[j] == 0:
                continue
            moved = planes.improve(values[j] + gradient[j - begin] / diagonal[j], values[j], j)
            gradient.addr_(hessian[begin:end, j], moved - values[j], alpha=-1)
            values[j] = moved
        given.addmm_(hessian[:, begin:end], values[begin:end] - before)
