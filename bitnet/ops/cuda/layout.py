"""Ternary weights in the order in which the CUDA kernels load them: two bits each, a lossless permutation of ``i2``.

Tiles of 16 rows and 128 columns take 512 bytes, and lane ``4 g + t`` of a warp loads 16 of them. Byte ``b`` of its word
``h`` holds the digits c = code + 1 of four weights (drawn in ``packed_linear.cu``, which says why)::

    bits      1:0              3:2              5:4                  7:6
    row       g                g + 8            g                    g + 8
    column    32t + 8h + b     32t + 8h + b     32t + 8h + b + 4     32t + 8h + b + 4
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int8, UInt8
from torch import Tensor

ROWS, COLUMNS, PANELS = 16, 128, 8  # of a tile; the largest block takes 8 panels of 16 rows


@dataclass(frozen=True, slots=True)
class Prepacked:
    """Weights [rows, columns] as tiles.

    Attributes:
        tiles: uint8 [panels, tiles, 512]; panels are a multiple of 8, and padding holds the digit 0.
        rows: out_features.
        columns: in_features.
    """

    tiles: UInt8[Tensor, "panels tiles 512"]
    rows: int
    columns: int


def prepack(codes: Int8[Tensor, "rows cols"]) -> Prepacked:
    """Codes -1, 0, +1 (of any layout: signs are ternary, too) in the kernels' order."""
    rows, columns = codes.shape
    digits = F.pad((codes + 1).to(torch.uint8), (0, -columns % COLUMNS, 0, -rows % (ROWS * PANELS)))
    # row = 16 panel + 8 upper + g, column = 128 tile + 32 t + 8 h + 4 later + b
    panels, tiles = digits.shape[0] // ROWS, digits.shape[1] // COLUMNS
    digits = digits.view(panels, 2, 8, tiles, 4, 4, 2, 4)
    upper, g, tile, t, h, later, b = 1, 2, 3, 4, 5, 6, 7
    digits = digits.permute(later, upper, 0, tile, g, t, h, b)
    packed = digits[0, 0] | digits[0, 1] << 2 | digits[1, 0] << 4 | digits[1, 1] << 6
    return Prepacked(packed.reshape(panels, tiles, 512), rows, columns)


def unprepack(weight: Prepacked) -> Int8[Tensor, "rows cols"]:
    """The codes that were prepacked."""
    panels, tiles, _ = weight.tiles.shape
    packed = weight.tiles.view(panels, tiles, 8, 4, 4, 4)
    digits = torch.stack([packed >> (2 * plane) & 3 for plane in range(4)]).view(2, 2, panels, tiles, 8, 4, 4, 4)
    later, upper, panel, tile, g, t, h, b = range(8)
    codes = digits.permute(panel, upper, g, tile, t, h, later, b).reshape(panels * ROWS, tiles * COLUMNS)
    return codes[: weight.rows, : weight.columns].to(torch.int8) - 1
