"""Latent weights that their layer's quantizer rounds to given codes.

Codes that were found otherwise say nothing about where in its cell a latent weight is to lie, and training moves it
from there. So as much as possible of the original weight stays in it:

- a weight that the quantizer would have rounded to its code anyway keeps its value (its excess over the border of the
  cell where the scale is a mean: see below);
- a weight that was moved to another code lies inside that code's cell, ``depth`` of the way from the border that it
  came over to the middle. At the border the first gradient could take it back, in the middle nothing is left of it.

The scale follows from the latent weights, except where it is learned and simply set:

mean      of ternary weights: zeros keep their magnitude, others have the border's plus an excess, all excesses
          multiplied by the one factor that makes the mean magnitude the scale. Of signs: the magnitudes of the positive
          and of the negative ones are multiplied so that each kind adds up to half of it, which keeps the mean, around
          which `centred_sign` turns, at zero.
maximum   values end at the outer codes, and the largest weight of each group lies on one.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.quant.grouping import grouped
from bitnet.quant.layer_grid import LayerGrid

DEPTH = 0.5
MARGIN = 1e-3  # of half a cell: a weight is never nearer to a border, so that the last bit of a scale moves no code


def check_depth(depth: object) -> None:
    """Raise InputError for a depth that is no place inside a cell."""
    if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 < depth <= 1:
        raise InputError(
            f"init.depth must be above 0 (the border of the cell) and at most 1 (its middle), got {depth!r}"
        )


def latent_weight(
    grid: LayerGrid,
    weight: Float[Tensor, "out in"],
    codes: Float[Tensor, "out in"],
    scale: Float[Tensor, "rows groups"],
    depth: float = DEPTH,
) -> Float[Tensor, "out in"]:
    """Weights, float32, that the quantizer of ``grid`` rounds to ``codes`` at ``scale``.

    Not possible, and then as near as it gets, are signs that are all alike, and groups that use no outer code where the
    scale is a maximum, or zeros alone where it is a mean.

    Args:
        grid: of the layer's quantizer.
        weight: the original.
        codes: as floats.
        scale: one that the quantizer can have (`LayerGrid.stored`).
        depth: where in its cell a weight lies that was moved to another code: 0 (border) to 1 (middle).
    """
    check_depth(depth)
    units = weight.float() / grid.columns(scale.float(), weight.shape[1])
    if grid.scale_from == "mean":
        units = _signs(grid, units, codes, depth) if grid.odd else _ternary(grid, units, codes, depth)
    else:
        units = _inside(grid, units, codes, depth)
    return units * grid.columns(scale.float(), weight.shape[1])


def _inside(grid: LayerGrid, units: Tensor, codes: Tensor, depth: float) -> Tensor:
    """Each value in the cell of its code; beyond the outer codes only where the scale is no maximum."""
    reach = grid.half * (1 - MARGIN)
    lower, upper = codes - reach, codes + reach
    if grid.scale_from == "parameter":
        lower, upper = (
            lower.masked_fill(codes == grid.low, -torch.inf),
            upper.masked_fill(codes == grid.high, torch.inf),
        )
    moved = codes + (units - codes).sign() * (grid.half * (1 - depth))
    placed = torch.where(grid.nearest(units) == codes, units.clamp(lower, upper), moved.clamp(lower, upper))
    if grid.scale_from == "parameter":
        return placed
    placed = placed.clamp(grid.low, grid.high)
    return _with_largest(grid, placed, units, codes)


def _with_largest(grid: LayerGrid, placed: Tensor, units: Tensor, codes: Tensor) -> Tensor:
    """``placed``, the largest weight among those with an outer code set to that code, in every group that has one."""
    size = grouped((units.abs() + 1).masked_fill(codes.abs() < grid.high, 0), grid.granularity)  # 0: none of them
    among, index = size.max(-1, keepdim=True)
    largest = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, index, among > 0)
    whole = grid.granularity == "tensor"
    largest = largest.reshape(units.shape) if whole else largest.flatten(1)[:, : units.shape[1]]
    return torch.where(largest, codes, placed)


def _ternary(grid: LayerGrid, units: Tensor, codes: Tensor, depth: float) -> Tensor:
    """Zeros below the border of their cell; the rest above it, such that the mean magnitude is 1."""
    border, magnitude = grid.half * (1 - MARGIN), units.abs()
    kept = grid.nearest(units) == codes
    zeros = torch.where(kept, magnitude.clamp(max=border), grid.half * (1 - depth)) * units.sign()
    excess = torch.where(kept, magnitude - grid.half, grid.half * depth).clamp(min=MARGIN)
    rest = codes != 0
    n = _total(torch.ones_like(units), grid)
    below = _total(torch.where(rest, grid.half, zeros.abs()), grid)
    over = _total(excess * rest, grid)
    factor = torch.where(over > 0, (n - below) / over, 0.0).float()
    outside = codes * (grid.half + excess * grid.columns(factor, units.shape[1]))
    return torch.where(rest, outside, zeros)


def _signs(grid: LayerGrid, units: Tensor, codes: Tensor, depth: float) -> Tensor:
    """Positive and negative weights that each add up to half of what makes the mean magnitude 1."""
    magnitude = torch.where(grid.nearest(units) == codes, units.abs(), depth).clamp(min=MARGIN)
    n = _total(torch.ones_like(units), grid)
    above = codes > 0
    if bool(above.all()) or not bool(above.any()):
        return units  # `centred_sign` has no such answer
    positive, negative = _total(magnitude * above, grid), _total(magnitude * ~above, grid)
    share = torch.where((positive > 0) & (negative > 0), 0.5, 1.0) * n
    factors = [torch.where(part > 0, share / part, 0.0).float() for part in (positive, negative)]
    up, down = (grid.columns(factor, units.shape[1]) for factor in factors)
    return codes * magnitude * torch.where(above, up, down)


def _total(x: Tensor, grid: LayerGrid) -> Tensor:
    """The sum for each scale, float64."""
    return grouped(x, grid.granularity).sum(-1, dtype=torch.float64)
