"""GPTQ: rounding to a uniform grid column by column, later columns making up for the error of earlier ones.

The published method (arXiv:2210.17323) and four things that make it better in the same bits:

``order="activation"``  columns with large inputs first, while there are many left to compensate with. Groups keep their
    places and their parameters are fitted beforehand (static groups), so no index is stored. ``"grouped"`` orders the
    groups, and the columns inside each, and can so fit a group when it is reached (dynamic groups).
``range="mse"``  the grid of a group clips where that lowers its error, weighted by the inputs' mean squares.
``correction``  a share of the target that a layer has to meet with the inputs of the quantized model moves to what the
    full-precision model's inputs would have given (`corrected_target`).
``sweeps``  coordinate descent after the loop: scales and zero points are refitted in closed form in the metric of the
    Hessian, and each code is chosen again given all others. The error never grows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq.compensation import check_compensation, compensate, sweep
from bitnet.ptq.protocol import LayerStats, Statistic
from bitnet.quant import QTensor
from bitnet.quant.grid import SCALE_DTYPES, Grid
from bitnet.quant.grouping import Granularity, group_size_of

ORDERS = ("none", "activation", "grouped")
GROUPS = ("static", "dynamic")


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQ:
    """Error-compensating rounding to a uniform grid.

    Args:
        bits: 2 to 8; 1.58 for ternary weights (symmetric, range absmean or mse).
        symmetric: no zero points; see `Grid`.
        granularity: "tensor", "row" or a group size.
        range: what a scale covers; see `Grid`.
        scale_dtype: how scales are stored.
        order: "none" (as they stand), "activation" or "grouped": in which columns are rounded.
        groups: "static" (fitted to the original weight) or "dynamic" (to the compensated one when a group is reached).
        damping: share of the mean diagonal added to the Hessian; raised tenfold where it does not suffice.
        correction: 0 to 1, strength of the correction towards the full-precision inputs.
        sweeps: passes of coordinate descent.
    """

    bits: float = 4
    symmetric: bool = False
    granularity: Granularity = 128
    range: str = "minmax"
    scale_dtype: str = "float16"
    order: str = "activation"
    groups: str = "static"
    damping: float = 0.01
    correction: float = 0.0
    sweeps: int = 0

    def __post_init__(self) -> None:
        size = group_size_of(self._grid.granularity)
        for name, value, choices in (("order", self.order, ORDERS), ("groups", self.groups, GROUPS)):
            if value not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.groups == "dynamic" and size is None:
            raise InputError(f"groups=dynamic fits groups of columns, and granularity={self.granularity} has none")
        if self.groups == "dynamic" and self.order == "activation":
            raise InputError(
                "groups=dynamic in the order of the activations would scatter a group over the row and need an index "
                "for each column: use groups=static, or order=grouped"
            )
        check_compensation(self.damping, self.correction, self.sweeps)

    @property
    def _grid(self) -> Grid:
        return Grid(self.bits, self.symmetric, self.granularity, self.range, self.scale_dtype)

    @property
    def requires(self) -> frozenset[Statistic]:
        return frozenset([Statistic.HESSIAN] + [Statistic.CROSS] * (self.correction > 0))

    @property
    def claimed_bits(self) -> float:
        return self.bits

    def quantize(self, weight: Float[Tensor, "out in"], stats: LayerStats | None) -> QTensor:
        """Quantize ``weight``; the arithmetic is in float32 (float64 for a float64 weight)."""
        assert stats is not None
        assert stats.hessian is not None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        hessian = stats.hessian.to(dtype)
        order = column_order(hessian.diagonal(), self.order, group_size_of(self.granularity))
        factor = stats.inverse_factor(self.damping, order, key=f"{self.order} {group_size_of(self.granularity)}")
        target = weight.to(dtype)
        if self.correction:
            assert stats.cross is not None
            target = corrected_target(target, stats.cross.to(dtype), factor.upper.to(dtype), order, self.correction)
        target = target.masked_fill(hessian.diagonal() == 0, 0)
        grid = UniformColumns(self._grid, order, target.shape, hessian.diagonal())
        if self.groups == "static":
            grid.fit_all(target)
        columns = target.t().contiguous()
        working = columns.clone() if order is None else columns[order]
        rounded = compensate(working, factor.upper.to(dtype), grid)
        values = rounded if order is None else torch.empty_like(columns).index_copy_(0, order, rounded)
        grid.order = None
        if self.sweeps:
            damped = hessian.clone()
            damped.diagonal().add_(factor.damping * hessian.diagonal().mean())
            for _ in range(self.sweeps):
                values = sweep(columns, values, damped, grid)
        return grid.codes(values)


def column_order(diagonal: Float[Tensor, " in"], order: str, group_size: int | None) -> Tensor | None:
    """The order to round columns in, int64 [in]; None: as they stand. Ties keep their order."""
    if order == "none":
        return None
    by_input = diagonal.argsort(descending=True, stable=True)
    if order == "activation" or group_size is None:
        return by_input
    n = len(diagonal)
    starts = range(0, n, group_size)
    largest = torch.stack([diagonal[start : start + group_size].max() for start in starts])
    if n % group_size:
        largest[-1] = -1.0  # the narrow group stays last, so that the others begin at multiples of their size
    inside = [start + diagonal[start : start + group_size].argsort(descending=True, stable=True) for start in starts]
    return torch.cat([inside[group] for group in largest.argsort(descending=True, stable=True).tolist()])


def corrected_target(
    weight: Float[Tensor, "out in"],
    cross: Float[Tensor, "in in"],
    upper: Float[Tensor, "in in"],
    order: Tensor | None,
    strength: float,
) -> Float[Tensor, "out in"]:
    """``W - strength * W cross (H + d I)^-1``: the weight that comes closest to the full-precision output.

    A layer of a model whose earlier layers are quantized gets inputs x in the place of x_fp. Of all weights W* the one
    that minimises ``||W x_fp - W* x||`` is ``W C (H + d I)^-1`` with C the mean of x_fp x^T; ``cross`` is H - C.

    Args:
        weight: W.
        cross: mean of (x - x_fp) x^T.
        upper: U of ``(H + d I)^-1 = U^T U``, its columns in ``order``.
        order: int64 [in], or None.
        strength: 0 leaves the weight as it is, 1 corrects fully (and trusts the calibration text fully).
    """
    moved = weight @ cross
    if order is not None:
        moved = moved[:, order]
    moved = moved @ upper.t() @ upper
    if order is not None:
        moved = torch.empty_like(moved).index_copy_(1, order, moved)
    return weight - strength * moved


class UniformColumns:
    """A `Grid` as the column loop sees it: scale and zero point [groups, out] of the column's group.

    Args:
        grid: granularity and levels.
        order: the order that columns come in, None for their own.
        shape: [out, in] of the weight.
        importance: [in], weight of each column's squared error where a range is searched.
    """

    def __init__(self, grid: Grid, order: Tensor | None, shape: tuple[int, ...], importance: Tensor) -> None:
        self._grid, self.order, self._importance = grid, order, importance
        self._out, self._columns = shape
        self._size = group_size_of(grid.granularity) or self._columns
        groups = -(-self._columns // self._size)
        self._scale = importance.new_zeros(groups, self._out)
        self._zero = importance.new_zeros(groups, self._out)
        self._dtype = SCALE_DTYPES[grid.scale_dtype]
        self._low, self._high = grid.low, grid.high
        self._fitted = False

    @property
    def order(self) -> Tensor | None:
        return self._order

    @order.setter
    def order(self, order: Tensor | None) -> None:
        self._order = order
        self._place = None if order is None else order.tolist()

    @property
    def span(self) -> int | None:
        return None if self._fitted and self._place is not None else self._size

    def fit_all(self, weight: Float[Tensor, "out in"]) -> None:
        """Fit every group to ``weight``, its columns in their own order; `fit` then changes nothing."""
        self._store(slice(None), weight, self._importance)
        self._fitted = True

    def fit(self, start: int, columns: Float[Tensor, "span out"]) -> None:
        if self._fitted:
            return
        importance = self._importance if self._order is None else self._importance[self._order]
        group = self._group(start)
        self._store(slice(group, group + 1), columns.t(), importance[start : start + len(columns)])

    def round(self, column: Float[Tensor, " out"], index: int) -> Float[Tensor, " out"]:
        group = self._group(index)
        scale, zero = self._scale[group], self._zero[group]
        codes = (column / scale).round_().add_(zero).clamp_(self._low, self._high)
        return codes.sub_(zero).mul_(scale)

    def refit(
        self,
        start: int,
        values: Float[Tensor, "span out"],
        gradient: Float[Tensor, "span out"],
        hessian: Float[Tensor, "span span"],
    ) -> Float[Tensor, "span out"]:
        """The best scale, and zero point one step to either side or none, for the codes there are; see `sweep`."""
        if self._grid.granularity == "tensor":
            return values
        group = start // self._size
        scale, zero = self._scale[group], self._zero[group]
        steps = (values / scale).round_()  # code - zero point
        product = hessian @ steps
        pull = (steps * gradient).sum(0) + (values * product).sum(0)  # <steps, H (D + Q)> of this span
        pull_one = gradient.sum(0) + (product * scale).sum(0)
        square, mixed, one = (steps * product).sum(0), product.sum(0), hessian.sum()
        best_gain = 2 * scale * pull - scale**2 * square
        best_scale, best_zero = scale.clone(), zero.clone()
        for shift in (0, -1, 1) if not self._grid.symmetric else (0,):
            along, length = pull - shift * pull_one, square - 2 * shift * mixed + shift**2 * one
            candidate = self._stored(along / length)
            gain = 2 * candidate * along - candidate**2 * length
            moved = zero + shift
            better = (gain > best_gain) & (candidate > 0) & torch.isfinite(candidate)
            better &= (moved >= self._low) & (moved <= self._high)
            best_gain = torch.where(better, gain, best_gain)
            best_scale, best_zero = torch.where(better, candidate, best_scale), torch.where(better, moved, best_zero)
        steps += zero - best_zero
        self._scale[group], self._zero[group] = best_scale, best_zero
        return steps.mul_(best_scale)

    def codes(self, values: Float[Tensor, "in out"]) -> QTensor:
        """The codes of ``values``, which lie on this grid, columns in their own order."""
        scale = self._scale.t().contiguous().to(self._dtype)
        zero = None if self._grid.symmetric else self._zero.t().contiguous().to(torch.int8)
        if self._grid.granularity == "tensor":
            scale, zero = scale[:1], None if zero is None else zero[:1]
        return self._grid.round(values.t().contiguous(), scale, zero)

    def _group(self, index: int) -> int:
        return (index if self._place is None else self._place[index]) // self._size

    def _store(self, groups: slice, weight: Tensor, importance: Tensor) -> None:
        scale, zero = self._grid.fit(weight, importance)
        self._scale[groups] = scale.t().to(self._scale.dtype)
        if zero is not None:
            self._zero[groups] = zero.t().to(self._zero.dtype)

    def _stored(self, scale: Tensor) -> Tensor:
        """Rounded as it is stored, in the dtype of the arithmetic."""
        return scale.to(self._dtype).to(scale.dtype)
