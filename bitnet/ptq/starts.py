"""Codes for a layer to begin its training with, on the grid of its own quantizer.

`LeastSquares`  the scale with the least squared error of the weights, and the nearest codes.
`Compensated`   GPTQ's loop on that grid: later columns make up for the error that earlier ones make in the layer's
                output; then coordinate descent with the scale refitted, in the metric of the Hessian.
`FromMethod`    the values that another method ends with (BiLLM, k-quants, ...), and the codes nearest to them.

Source of the loop: GPTQ, arXiv:2210.17323. The grids, the refits and the combination are ours.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq.compensation import check_compensation, compensate, sweep
from bitnet.ptq.gptq import column_order, corrected_target
from bitnet.ptq.protocol import LayerStats, PTQMethod, Statistic
from bitnet.quant.grouping import group_size_of
from bitnet.quant.latent import DEPTH, check_depth
from bitnet.quant.layer_grid import LayerGrid

Begun = tuple[Float[Tensor, "out in"], Float[Tensor, "rows groups"]]
"""Codes, as floats, and the scale that goes with them."""


class Start(Protocol):
    """One way to find them."""

    depth: float  # where in its cell a weight lies that was moved to another code, see `bitnet.quant.latent`

    @property
    def requires(self) -> frozenset[Statistic]:
        """What has to be known of the layer's inputs; empty where no text is needed."""
        ...

    def begin(self, weight: Float[Tensor, "out in"], grid: LayerGrid, stats: LayerStats | None) -> Begun:
        """Codes and scale for ``weight`` on ``grid``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastSquares:
    """The nearest codes at the scale with the least squared error of the weights; no text needed.

    Args:
        depth: where in its cell a weight lies that was moved to another code: 0 (the border) to 1 (the middle).
    """

    depth: float = DEPTH

    def __post_init__(self) -> None:
        check_depth(self.depth)

    @property
    def requires(self) -> frozenset[Statistic]:
        return frozenset()

    def begin(self, weight: Float[Tensor, "out in"], grid: LayerGrid, stats: LayerStats | None) -> Begun:
        weight = weight.float()
        scale = grid.fit(weight)
        return grid.nearest(weight / grid.columns(scale, weight.shape[1])), scale


@dataclass(frozen=True, slots=True, kw_only=True)
class FromMethod:
    """The codes nearest to what ``method`` makes of the weight, at the scale with the least squared error of that.

    Args:
        method: any post-training method, such as `BiLLM`.
        depth: see `LeastSquares`.
    """

    method: PTQMethod
    depth: float = DEPTH

    def __post_init__(self) -> None:
        check_depth(self.depth)
        if isinstance(self.method, type) or not hasattr(self.method, "quantize"):
            raise InputError(f"init.method must be a post-training method, such as BiLLM(), got {self.method!r}")

    @property
    def requires(self) -> frozenset[Statistic]:
        return self.method.requires

    def begin(self, weight: Float[Tensor, "out in"], grid: LayerGrid, stats: LayerStats | None) -> Begun:
        values = self.method.quantize(weight, stats).dequantize()
        return LeastSquares().begin(values, grid, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensated:
    """GPTQ's loop on the layer's own grid, columns with large inputs first, then ``sweeps`` of coordinate descent.

    Args:
        damping: share of the mean diagonal added to the Hessian; raised tenfold where it does not suffice.
        correction: 0 to 1, strength of the correction towards the full-precision inputs, see `corrected_target`.
        sweeps: passes of coordinate descent, each after a refit of the scales in closed form; 0: the loop alone.
        depth: see `LeastSquares`.
    """

    damping: float = 0.01
    correction: float = 0.0
    sweeps: int = 0
    depth: float = DEPTH

    def __post_init__(self) -> None:
        check_depth(self.depth)
        check_compensation(self.damping, self.correction, self.sweeps, prefix="init.")

    @property
    def requires(self) -> frozenset[Statistic]:
        return frozenset([Statistic.HESSIAN] + [Statistic.CROSS] * (self.correction > 0))

    def begin(self, weight: Float[Tensor, "out in"], grid: LayerGrid, stats: LayerStats | None) -> Begun:
        assert stats is not None
        assert stats.hessian is not None
        hessian = stats.hessian
        order = column_order(hessian.diagonal(), "activation", None)
        assert order is not None
        factor = stats.inverse_factor(self.damping, order, key="activation")
        target = weight.float()
        if self.correction:
            assert stats.cross is not None
            target = corrected_target(target, stats.cross, factor.upper, order, self.correction)
        target = torch.where(hessian.diagonal() == 0, weight.float(), target)  # no input: as it was
        columns = _Columns(grid, target, hessian.diagonal())
        transposed = target.t().contiguous()
        columns.order = order
        rounded = compensate(transposed[order], factor.upper, columns)
        columns.order = None
        values = torch.empty_like(transposed).index_copy_(0, order, rounded)
        if self.sweeps:
            damped = hessian.clone()
            damped.diagonal().add_(factor.damping * hessian.diagonal().mean())
            for _ in range(self.sweeps):
                values = sweep(transposed, values, damped, columns)
        return columns.codes(values), columns.scale.t().contiguous()[: 1 if grid.granularity == "tensor" else None]


class _Columns:
    """A `LayerGrid` as the column loop sees it, fitted beforehand: scales [groups, out].

    Where the scale is a maximum, one weight of each group, the largest, is held at an outer code: without it the
    layer's quantizer would find a smaller scale. Columns without input keep the codes of their weights.
    """

    def __init__(self, grid: LayerGrid, weight: Float[Tensor, "out in"], importance: Float[Tensor, " in"]) -> None:
        self._grid, (out, self._count) = grid, weight.shape
        self._size = group_size_of(grid.granularity) or self._count
        scale = grid.fit(weight, importance.clamp(min=1e-6 * float(importance.mean())))
        self.scale = scale.expand(out, -1).t().contiguous()
        self._held = self._largest(weight) if grid.scale_from == "maximum" else None
        self._place: list[int] | None = None

    @property
    def order(self) -> None:
        """The order that columns come in: int64 [in], None for their own."""

    @order.setter
    def order(self, order: Tensor | None) -> None:
        self._place = None if order is None else order.tolist()

    @property
    def span(self) -> int | None:
        return None if self._place is not None else self._size

    def fit(self, start: int, columns: Float[Tensor, "span out"]) -> None:
        """Every scale was fitted beforehand."""

    def round(self, column: Float[Tensor, " out"], index: int) -> Float[Tensor, " out"]:
        index = index if self._place is None else self._place[index]
        scale = self.scale[index // self._size]
        codes = self._grid.nearest(column / scale)
        if self._held is not None:
            codes = torch.where(self._held[index] != 0, self._held[index], codes)
        return codes.mul_(scale)

    def refit(
        self,
        start: int,
        values: Float[Tensor, "span out"],
        gradient: Float[Tensor, "span out"],
        hessian: Float[Tensor, "span span"],
    ) -> Float[Tensor, "span out"]:
        """The best scale for the codes there are, in closed form; see `bitnet.ptq.compensation.sweep`."""
        group = start // self._size
        scale = self.scale[group]
        codes = (values / scale).round_()
        product = hessian @ codes
        pull = (codes * gradient).sum(0) + (values * product).sum(0)  # <codes, H (D + Q)> of this span
        square = (codes * product).sum(0)
        if self._grid.granularity == "tensor":
            pull, square = pull.sum().expand_as(pull), square.sum().expand_as(square)
        fitted = self._grid.stored(torch.where(square > 0, pull / square, scale))
        gain = 2 * fitted * pull - fitted**2 * square
        better = (gain > 2 * scale * pull - scale**2 * square) & torch.isfinite(fitted)
        self.scale[group] = torch.where(better, fitted, scale)
        return codes.mul_(self.scale[group])

    def codes(self, values: Float[Tensor, "in out"]) -> Float[Tensor, "out in"]:
        """The codes of ``values``, which lie on this grid."""
        scale = self.scale.repeat_interleave(self._size, 0)[: self._count]
        return (values / scale).round_().t().contiguous()

    def _largest(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "in out"]:
        """The outer code for the largest weight that shares each scale, 0 for all others (and where all are zero)."""
        held = torch.zeros_like(weight)
        if self._grid.granularity == "tensor":
            index = weight.abs().argmax()
            held.view(-1)[index] = weight.view(-1)[index].sign() * self._grid.high
            return held.t().contiguous()
        for start in range(0, self._count, self._size):
            part = weight[:, start : start + self._size]
            index = part.abs().argmax(1, keepdim=True)
            held[:, start : start + self._size].scatter_(1, index, part.gather(1, index).sign() * self._grid.high)
        return held.t().contiguous()
