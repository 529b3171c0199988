"""Rounding one column at a time, with the columns that are still to come making up for the error.

`compensate` is GPTQ's loop (arXiv:2210.17323, algorithm 1): round column j, and add to every later column k what
compensates best, ``-e_j U_jk`` with ``e_j = (w_j - q_j) / U_jj``. `sweep` is coordinate descent on the same objective
``tr(D H D^T)``: each column in turn moves to the best grid value given all others, so the error never grows.

Both work on the transposed weight [in, out], where a column of the weight is contiguous, and on two levels of blocks:
inside a small block columns update each other one by one; a block's effect on the rest is one matrix product. The
result is that of the textbook loop, which touches the whole matrix once a column.

What is rounded to is a `ColumnGrid`: the uniform grids of `bitnet.ptq.gptq`, or a k-quant's super-blocks.
"""

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError

OUTER = 128  # columns whose errors go to the rest of the matrix in one product
INNER = 32  # columns that update each other one by one


def check_compensation(damping: float, correction: float, sweeps: int, *, prefix: str = "") -> None:
    """Raise InputError for options that no compensation takes; ``prefix`` stands in front of their names."""
    if not 0 < damping <= 1:
        raise InputError(f"{prefix}damping must be above 0 and at most 1 (of the mean diagonal), got {damping}")
    if not 0 <= correction <= 1:
        raise InputError(f"{prefix}correction must be between 0 (off) and 1, got {correction}")
    if type(sweeps) is not int or sweeps < 0:
        raise InputError(f"{prefix}sweeps must be a whole number, 0 or more, got {sweeps!r}")


class ColumnGrid(Protocol):
    """A grid in columns: some of them get their parameters together, then each is rounded by itself."""

    @property
    def span(self) -> int | None:
        """Columns that are fitted together when the first of them is reached; None: all of them, beforehand."""
        ...

    def fit(self, start: int, columns: Float[Tensor, "span out"]) -> None:
        """Choose the parameters of the columns from ``start`` on for their present values."""
        ...

    def round(self, column: Float[Tensor, " out"], index: int) -> Float[Tensor, " out"]:
        """The grid's nearest values to column ``index``, computed in the dtype of ``column``."""
        ...


def compensate(
    columns: Float[Tensor, "in out"], upper: Float[Tensor, "in in"], grid: ColumnGrid
) -> Float[Tensor, "in out"]:
    """Round every column to ``grid``, first to last, later ones compensating for earlier ones.

    Args:
        columns: transposed weight; used as the working copy and changed.
        upper: U of ``H^-1 = U^T U`` (`bitnet.ptq.hessian.inverse_factor`).
        grid: fitted here, span by span, to the compensated values.

    Returns:
        The rounded values, in the dtype of ``columns``.
    """
    n = len(columns)
    outer, inner = _blocks(grid.span, n)
    values = torch.empty_like(columns)
    diagonal = upper.diagonal().tolist()
    if grid.span is None:
        grid.fit(0, columns)
    for begin in range(0, n, outer):
        end = min(begin + outer, n)
        errors = torch.empty_like(columns[begin:end])
        for first in range(begin, end, inner):
            last = min(first + inner, end)
            for j in range(first, last):
                if grid.span is not None and j % grid.span == 0:
                    grid.fit(j, columns[j : j + grid.span])
                values[j] = grid.round(columns[j], j)
                torch.sub(columns[j], values[j], out=errors[j - begin]).div_(diagonal[j])
                columns[j + 1 : last].addr_(upper[j, j + 1 : last], errors[j - begin], alpha=-1)
            done = errors[first - begin : last - begin]
            columns[last:end].addmm_(upper[first:last, last:end].t(), done, alpha=-1)
        columns[end:].addmm_(upper[begin:end, end:].t(), errors, alpha=-1)
    return values


def sweep(
    target: Float[Tensor, "in out"],
    values: Float[Tensor, "in out"],
    hessian: Float[Tensor, "in in"],
    grid: "RefittedGrid",
) -> Float[Tensor, "in out"]:
    """One pass of coordinate descent over ``values``: the error ``tr(D H D^T)``, D = target - values, never grows.

    Span by span the grid may first choose better parameters for the codes there are; then each column moves to the
    grid value nearest to its optimum ``values_j + (H D)_j / H_jj``. A column without input (H_jj = 0) stays.
    """
    n = len(target)
    values = values.clone()
    span = grid.span or n
    gradient = hessian @ (target - values)
    diagonal = hessian.diagonal().tolist()
    for begin in range(0, n, span):
        end = min(begin + span, n)
        before = values[begin:end].clone()
        own = hessian[begin:end, begin:end]
        local = gradient[begin:end]  # a view: kept right for the columns of this span
        refitted = grid.refit(begin, values[begin:end], local, own)
        local.addmm_(own, refitted - values[begin:end], alpha=-1)
        values[begin:end] = refitted
        for first in range(0, end - begin, INNER):
            last = min(first + INNER, end - begin)
            start = values[begin + first : begin + last].clone()
            for j in range(first, last):
                if diagonal[begin + j] <= 0:
                    continue
                column = values[begin + j]
                moved = grid.round(column + local[j] / diagonal[begin + j], begin + j)
                local[first:last].addr_(own[j, first:last], moved - column, alpha=-1)
                values[begin + j] = moved
            change = values[begin + first : begin + last] - start
            local[:first].addmm_(own[:first, first:last], change, alpha=-1)
            local[last:].addmm_(own[last:, first:last], change, alpha=-1)
        change = values[begin:end] - before
        gradient[:begin].addmm_(hessian[:begin, begin:end], change, alpha=-1)
        gradient[end:].addmm_(hessian[end:, begin:end], change, alpha=-1)
    return values


class RefittedGrid(ColumnGrid, Protocol):
    """A grid whose parameters can be improved for codes that are chosen already."""

    def refit(
        self,
        start: int,
        values: Float[Tensor, "span out"],
        gradient: Float[Tensor, "span out"],
        hessian: Float[Tensor, "span span"],
    ) -> Float[Tensor, "span out"]:
        """Choose better parameters for the columns from ``start`` on and return the values of their codes with them.

        ``gradient`` is H D there, ``hessian`` the block of H. The error must not grow; returning ``values`` unchanged
        is always right.
        """
        ...


def _blocks(span: int | None, n: int) -> tuple[int, int]:
    """Sizes of the outer and the inner block, such that every span begins where all earlier errors have reached it.

    The rest of the outer block is up to date after each inner block, the rest of the matrix after each outer one. So a
    span begins with an inner block, and ends inside the outer block that it begins in or is made of whole outer blocks.
    """
    if span is None or span >= n:
        return OUTER, INNER
    inner = _divisor(span, INNER)
    if span <= OUTER:
        return span * (OUTER // span), inner
    return inner * _divisor(span // inner, OUTER // inner or 1), inner


def _divisor(number: int, most: int) -> int:
    """The largest divisor up to ``most``."""
    return max(size for size in range(1, most + 1) if number % size == 0)
