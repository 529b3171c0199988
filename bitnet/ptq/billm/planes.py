"""Weights in binary planes: a sign for most columns, none for some, up to five bits for the most salient.

The format of `bitnet.ptq.billm.BLOCK` spends its bits on numbers a row and block and on a bitmap. This one spends them
on planes: column j is stored in ``orders[j]`` planes of one bit a row, its weights are

    w_ij = row_scale_i * column_scale_j * LEVELS[orders[j]][code_ij]

with the levels that suit a normal distribution best (Max 1960; Lloyd 1982), and nothing else is stored:

::

    part            bits                                              256 x 256 at 1.5 bits
    planes          sum of orders * rows                              1.42
    orders          4 a column                                        4 / rows = 0.016
    row_scale       8 a row, on a logarithmic grid, 0 for zero        8 / columns = 0.031
    column_scale    8 a column, likewise                              8 / rows = 0.031
    grid            2 * 2 float32: logarithm of the smallest scale, and the step

Order 0 stores nothing: the column is zero and others compensate. Order 1 is a sign, order 2 a sign and a magnitude
bit (BiLLM's sparse and dense, with the split where the levels meet), and so on: structure by columns, no bitmap.

The planes are one string of bits (layout b1): plane 0 of all columns that have one, row by row, then plane 1, ...
Bit p of a code is in plane p. Codes count the levels from the lowest up.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from bitnet.ptq.billm.stored import pack_bits, unpack_bits

MAGNITUDES = (
    (),
    (0.7979,),
    (0.4528, 1.5104),
    (0.2451, 0.7560, 1.3439, 2.1519),
    (0.1284, 0.3880, 0.6568, 0.9424, 1.2562, 1.6180, 2.0690, 2.7326),
    (0.0659, 0.1981, 0.3314, 0.4667, 0.6049, 0.7471, 0.8946, 1.0488,
     1.2118, 1.3863, 1.5762, 1.7872, 2.0287, 2.3177, 2.6911, 3.2607),
)  # fmt: skip
DISTORTION = (1.0, 0.36338, 0.11752, 0.034548, 0.009501, 0.002505)
"""Mean squared error of a unit normal variable on the levels of each order."""
MOST_PLANES = len(MAGNITUDES) - 1


def levels(order: int) -> Float[Tensor, " levels"]:
    """The values of the codes 0, 1, ... in units of the scales; [0.0] for order 0."""
    positive = torch.tensor(MAGNITUDES[order])
    return torch.cat([-positive.flip(0), positive]) if order else torch.zeros(1)


@dataclass(frozen=True, slots=True)
class ScaleGrid:
    """256 scales: 0, and 255 values evenly spaced in their logarithm.

    ``table`` [256] is the only source of values, so that what is searched and what is read back agree to the bit.
    """

    table: Float[Tensor, " 256"]

    @staticmethod
    def of(low: float, step: float, device: torch.device | None = None) -> "ScaleGrid":
        """The grid ``exp(low + k step)``, k = 0 to 254, computed on the CPU wherever it will be."""
        steps = torch.arange(255, dtype=torch.float64)
        return ScaleGrid(torch.cat([torch.zeros(1), torch.exp(low + step * steps).float()]).to(device))

    def codes(self, scale: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
        """The nearest scale's code; 0 for what is not positive."""
        middles = (self.table[1:] + self.table[:-1]) / 2
        return torch.bucketize(scale, middles).to(torch.uint8)

    def nearest(self, scale: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``scale`` moved to the grid."""
        return self.values(self.codes(scale))

    def values(self, codes: UInt8[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.table.take(codes.long())  # not [...]: it would fetch a single code from the device first


@dataclass(frozen=True, slots=True)
class PlaneWeight:
    """A weight [rows, columns] in binary planes; see above for the bytes.

    Attributes:
        planes: b1, sum of orders * rows bits.
        orders: two columns a byte, the first the lower half.
        row_scale: codes on the first grid.
        column_scale: codes on the second grid.
        grid: float32 [2, 2], ``low`` and ``step`` of the rows' and of the columns' `ScaleGrid`.
        rows: out_features.
        columns: in_features.
    """

    planes: UInt8[Tensor, " plane_bytes"]
    orders: UInt8[Tensor, " order_bytes"]
    row_scale: UInt8[Tensor, " rows"]
    column_scale: UInt8[Tensor, " columns"]
    grid: Float[Tensor, "2 2"]
    rows: int
    columns: int

    @staticmethod
    def from_codes(
        codes: UInt8[Tensor, "rows columns"],
        orders: Int64[Tensor, " columns"],
        row_scale: UInt8[Tensor, " rows"],
        column_scale: UInt8[Tensor, " columns"],
        grid: Float[Tensor, "2 2"],
    ) -> "PlaneWeight":
        """Pack codes below ``2 ** orders[j]``."""
        bits = [((codes[:, orders > p] >> p) & 1).flatten() for p in range(MOST_PLANES)]
        pairs = torch.cat([orders, orders.new_zeros(len(orders) % 2)]).view(-1, 2)
        nibbles = (pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8)
        return PlaneWeight(
            pack_bits(torch.cat(bits) > 0), nibbles, row_scale, column_scale, grid, codes.shape[0], codes.shape[1]
        )

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.rows, self.columns])

    @property
    def parts(self) -> dict[str, float]:
        """Bits a weight that each tensor takes."""
        names = ("planes", "orders", "row_scale", "column_scale", "grid")
        bits = {name: getattr(self, name).numel() * getattr(self, name).element_size() * 8 for name in names}
        return {name: count / (self.rows * self.columns) for name, count in bits.items()}

    @property
    def bits_per_weight(self) -> float:
        """All bytes of all tensors."""
        return sum(self.parts.values())

    @property
    def planes_per_column(self) -> Int64[Tensor, " columns"]:
        """How many planes each column is stored in."""
        return torch.stack([self.orders & 15, self.orders >> 4], 1).flatten()[: self.columns].long()

    def codes(self) -> UInt8[Tensor, "rows columns"]:
        """The code of every weight; 0 in a column without planes."""
        orders = self.planes_per_column
        counts = [int((orders > p).sum()) * self.rows for p in range(MOST_PLANES)]
        bits = unpack_bits(self.planes, sum(counts)).to(torch.uint8)
        codes = torch.zeros(self.rows, self.columns, dtype=torch.uint8, device=bits.device)
        for p, plane in enumerate(bits.split(counts)):
            if len(plane):
                codes[:, orders > p] |= plane.view(self.rows, -1) << p
        return codes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        """The values: ``(level * row_scale) * column_scale`` in float32, rounded once to ``dtype``."""
        orders = self.planes_per_column
        table = torch.zeros(MOST_PLANES + 1, 2**MOST_PLANES, device=orders.device)
        for order in range(1, MOST_PLANES + 1):
            table[order, : 2**order] = levels(order).to(table.device)
        out = table.flatten()[(orders << MOST_PLANES) + self.codes().long()]
        low_step = self.grid.tolist()
        out *= ScaleGrid.of(*low_step[0], device=out.device).values(self.row_scale)[:, None]
        out *= ScaleGrid.of(*low_step[1], device=out.device).values(self.column_scale)
        return out.to(dtype)
