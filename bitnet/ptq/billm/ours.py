"""A weight in binary planes: which columns get how many, a first choice with compensation, then refinement.

1. The target is what comes closest to the full-precision output on the quantized model's inputs (`corrected_target`).
2. Columns are taken in the order of their inputs' size, and get planes by their saliency (`allocation`).
3. Scales start from the rows' and columns' root mean squares; codes from one pass of error compensation.
4. Scales and codes are refined in turn in the metric of the inputs (`refine`): the error never grows.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bitnet.ptq.billm.allocation import affordable_planes, planes_per_column
from bitnet.ptq.billm.planes import PlaneWeight, ScaleGrid
from bitnet.ptq.billm.refine import Planes, refine_columns, refine_rows
from bitnet.ptq.compensation import compensate

SPREAD = 4.0  # the grid of scales reaches so far beyond the smallest and the largest one it starts from
SMALLEST = 1e-3  # of the largest scale: rows and columns below it start from here

Watch = Callable[[str, Float[Tensor, "in out"]], None]
"""Called with the name of the step that was made and the values (transposed) after it."""


def quantize_to_planes(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    upper: Float[Tensor, "in in"],
    order: Int64[Tensor, " in"],
    bits: float,
    sweeps: int,
    watch: Watch | None = None,
) -> PlaneWeight:
    """Quantize ``weight`` to at most ``bits`` a weight, scales and all.

    Args:
        weight: the target, float32; columns without input are zero in it.
        hessian: damped, in the order of the weight's columns.
        upper: U of ``hessian^-1 = U^T U``, its columns in ``order``.
        order: in which columns are quantized.
        bits: see `affordable_planes` for matrices that are too small for them.
        sweeps: rounds of refinement.
        watch: for tests.
    """
    rows, columns = weight.shape
    target = weight.t()[order].contiguous()
    metric = hessian[order][:, order].contiguous()
    saliency = target.square().sum(1) / upper.diagonal().square()
    orders = planes_per_column(saliency, affordable_planes(bits, rows, columns))
    planes, grid = start(target, orders)
    values = compensate(target.clone(), upper, planes)
    if sweeps:
        wanted, given = metric @ target, metric @ values
        for _ in range(sweeps):
            refine_rows(planes, values, wanted, given)
            if watch is not None:
                watch("rows", values)
            refine_columns(planes, values, wanted, given, metric)
            if watch is not None:
                watch("columns", values)
    back = order.argsort()
    return PlaneWeight.from_codes(
        planes.codes[back].t(),
        orders[back],
        planes.row_grid.codes(planes.row),
        planes.column_grid.codes(planes.column[back]),
        grid,
    )


def start(target: Float[Tensor, "in out"], orders: Int64[Tensor, " in"]) -> tuple[Planes, Float[Tensor, "2 2"]]:
    """Scales such that ``w_ij / (row_i column_j)`` has unit mean square in every row and column, on their grids.

    The second result is what the grids are made from. Dividing by rows and columns in turn (Sinkhorn's iteration on
    the squares) converges in a few rounds.
    """
    square = target.square()
    square_column = square.mean(1).clamp(min=1e-30)
    square_row = torch.ones_like(square[0])
    for _ in range(4):
        square_row = (square / square_column[:, None]).mean(0)
        square_column = (square / square_row.clamp(min=1e-30)).mean(1).clamp(min=1e-30)
    row_grid, row_ends = _grid(square_row.sqrt())
    column_grid, column_ends = _grid(square_column.sqrt())
    planes = Planes(
        orders.tolist(),
        row_grid,
        column_grid,
        row_grid.nearest(square_row.sqrt()),
        column_grid.nearest(square_column.sqrt()),
        torch.zeros(target.shape, dtype=torch.uint8, device=target.device),
    )
    return planes, torch.tensor([row_ends, column_ends], device=target.device)


def _grid(scale: Float[Tensor, " n"]) -> tuple[ScaleGrid, tuple[float, float]]:
    largest = float(scale.max()) or 1.0
    smallest = float(torch.where(scale > SMALLEST * largest, scale, largest).min())
    low, step = math.log(smallest / SPREAD), math.log(largest / smallest * SPREAD**2) / 254
    low, step = torch.tensor([low, step]).tolist()  # as they will be read back
    return ScaleGrid.of(low, step, scale.device), (low, step)
