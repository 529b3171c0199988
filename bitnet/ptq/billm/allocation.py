"""How many binary planes each column gets: as many as its saliency is worth.

Where later columns compensate, a column's squared error counts ``1 / U_jj^2`` times, so a column of n planes costs
about ``saliency_j * DISTORTION[n]`` with the paper's saliency, ``sum over rows of w_ij^2 / U_jj^2``. A plane costs
the same in every column, and each further one is worth less than the last: taking the most valuable planes one by one
until the bits are spent gives the smallest total. This is BiLLM's choice of salient columns with its two sizes, one or
two signs, replaced by none to five, and one set for the layer instead of one in each block.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bitnet.ptq.billm.planes import DISTORTION


def planes_per_column(saliency: Float[Tensor, " in"], n_planes: int) -> Int64[Tensor, " in"]:
    """``n_planes`` planes given to the columns, at most five each; none to a column of saliency 0. Ties go left."""
    worth = torch.tensor(DISTORTION, dtype=torch.float64, device=saliency.device)
    gains = (saliency.double()[:, None] * (worth[:-1] - worth[1:])).flatten()
    taken = gains.argsort(descending=True, stable=True)[: max(n_planes, 0)]
    taken = taken[gains[taken] > 0]
    return torch.bincount(taken // (len(worth) - 1), minlength=len(saliency))


def affordable_planes(bits: float, rows: int, columns: int) -> int:
    """How many planes of one bit a row fit into ``bits`` a weight, beside the scales and orders of the matrix.

    A matrix so small that its scales leave less than half a plane a column gets one for every column all the same: its
    ``bits_per_weight`` says what that costs.
    """
    overhead = 8 * rows + 8 * columns + 8 * -(-columns // 2) + 4 * 32
    budget = int(bits * rows * columns) - overhead
    planes = (budget // 8 * 8) // rows
    return planes if 2 * planes >= columns else columns
