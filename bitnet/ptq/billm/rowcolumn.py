"""The storage of ARB-LLM RC: BiLLM's, with a scale for each row and each column of a group in the place of its mean.

::

    part       bits                                     of a weight (512 x 512, block 128, share r of salient columns)
    signs      one a weight                             1
    residual   one a weight of a salient column         r
    bitmap     one a weight                             1
    salient    one a column                             1 / rows
    row        3 terms * 2 groups * 16 a row and block  96 / 128 = 0.75
    column     2 groups * 16 a column and term          32 (1 + r) / rows = 0.06
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bitnet.ptq.billm.stored import unpack_bits


@dataclass(frozen=True, slots=True)
class RowColumnBinary:
    """A weight [rows, columns]; a value is ``row * column * sign``, and in a salient column the sum of two of them.

    Attributes:
        signs: b1, rows * columns bits.
        residual: b1, rows * salient columns bits: signs of the second term.
        bitmap: b1, rows * columns bits: the group of a weight.
        salient: b1, columns bits.
        row: [3, 2, rows, blocks], of the only term, the first and the second one; of both groups.
        column: [2, columns + salient columns], first terms before second ones.
        rows: out_features.
        columns: in_features.
        block_size: columns of a block.
    """

    signs: UInt8[Tensor, " sign_bytes"]
    residual: UInt8[Tensor, " residual_bytes"]
    bitmap: UInt8[Tensor, " bitmap_bytes"]
    salient: UInt8[Tensor, " flag_bytes"]
    row: Float[Tensor, "3 2 rows blocks"]
    column: Float[Tensor, "2 terms"]
    rows: int
    columns: int
    block_size: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.rows, self.columns])

    @property
    def parts(self) -> dict[str, float]:
        """Bits a weight that each tensor takes."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        weights = self.rows * self.columns
        return {name: tensor.numel() * tensor.element_size() * 8 / weights for name, tensor in tensors.items()}

    @property
    def bits_per_weight(self) -> float:
        """All bytes of all tensors."""
        return sum(self.parts.values())

    @property
    def claimed_bits(self) -> float:
        """What the paper counts: one bit, and another one in the salient columns."""
        return 1.0 + float(unpack_bits(self.salient, self.columns).float().mean())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        """The values, in float32, rounded once to ``dtype``."""
        salient = unpack_bits(self.salient, self.columns)
        group = unpack_bits(self.bitmap, self.rows * self.columns).view(self.shape).long()
        row = self.row.float().repeat_interleave(self.block_size, dim=3)[..., : self.columns]
        row = torch.stack([torch.where(salient, row[1], row[0]), row[2]])
        first, second = self.column.float().split([self.columns, self.column.shape[1] - self.columns], dim=1)
        out = self._term(row[0] * first[:, None], group, self.signs)
        if second.shape[1]:
            own = row[1][..., salient] * second[:, None]
            out[:, salient] += self._term(own, group[:, salient], self.residual)
        return out.to(dtype)

    def _term(self, scale: Float[Tensor, "2 rows n"], group: Tensor, signs: Tensor) -> Float[Tensor, "rows n"]:
        positive = unpack_bits(signs, group.numel()).view(group.shape)
        value = scale.gather(0, group[None])[0]
        return torch.where(positive, value, -value)
