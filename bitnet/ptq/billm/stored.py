"""The published format of BiLLM as bytes: what its weights really take, 3.0 bits each at blocks of 128 columns.

::

    part            bits                                   of a weight (block 128, a share r of salient columns)
    signs           one a weight                           1
    residual        one a weight of a salient column       r
    bitmap          one a weight of the other columns      1 - r       in the sparse group?
    salient         one a column                           1 / rows
    scale, mean     4 + 4 numbers of 16 bits a row, block  8 * 16 / 128 = 1

The published count is the signs and the residual alone: "1.08 bits". r cancels. Bits of all rows are packed one after
the other (`bitnet.quant.packing`, layout b1), so no row is filled up by itself.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int8, Int32, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from bitnet.ptq.billm.published import Block
from bitnet.quant.packing import unpack

SPARSE, DENSE, FIRST, SECOND = range(4)


@dataclass(frozen=True, slots=True)
class BlockBinary:
    """A weight [rows, columns] in the published format.

    Attributes:
        signs: b1, rows * columns bits: of the only term, or of the first.
        residual: b1, rows * salient columns bits: signs of the second term.
        bitmap: b1, rows * other columns bits: 1 in the sparse group.
        salient: b1, columns bits: 1 for a salient column.
        scale: [4, rows, blocks], of the terms sparse, dense, first, second.
        mean: in the shape of ``scale``, or None where there are none.
        zeros: int32 [n, 2], (row, column) of a third level: an entry that equals its group's mean, sign 0. Empty but
            for weights that are exactly symmetric.
        zeros_second: the same for the second term; columns counted among the salient ones.
        rows: out_features.
        columns: in_features.
        block_size: columns of a block.
    """

    signs: UInt8[Tensor, " sign_bytes"]
    residual: UInt8[Tensor, " residual_bytes"]
    bitmap: UInt8[Tensor, " bitmap_bytes"]
    salient: UInt8[Tensor, " flag_bytes"]
    scale: Float[Tensor, "4 rows blocks"]
    mean: Float[Tensor, "4 rows blocks"] | None
    zeros: Int32[Tensor, "n 2"]
    zeros_second: Int32[Tensor, "m 2"]
    rows: int
    columns: int
    block_size: int

    @staticmethod
    def from_blocks(blocks: list[Block], block_size: int, dtype: torch.dtype, means: bool) -> "BlockBinary":
        """Pack what `bitnet.ptq.billm.published.binarize` found."""
        salient = torch.cat([block.salient for block in blocks])
        sparse = torch.cat([block.sparse.members for block in blocks], 1)
        dense = torch.cat([block.dense.members for block in blocks], 1)
        sign, scale, mean = (
            [torch.cat([getattr(block.terms[k], name) for block in blocks], 1) for k in range(4)]
            for name in ("sign", "scale", "mean")
        )
        signs = torch.where(salient, sign[FIRST], torch.where(sparse, sign[SPARSE], sign[DENSE]))
        second = sign[SECOND][:, salient]
        assert bool((sparse | dense | salient).all())
        return BlockBinary(
            pack_bits(signs >= 0),
            pack_bits(second >= 0),
            pack_bits(sparse[:, ~salient]),
            pack_bits(salient),
            torch.stack(scale).to(dtype),
            torch.stack(mean).to(dtype) if means else None,
            (signs == 0).nonzero().to(torch.int32),
            (second == 0).nonzero().to(torch.int32),
            signs.shape[0],
            signs.shape[1],
            block_size,
        )

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.rows, self.columns])

    @property
    def parts(self) -> dict[str, float]:
        """Bits a weight that each tensor takes."""
        names = ("signs", "residual", "bitmap", "salient", "scale", "mean", "zeros", "zeros_second")
        tensors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The values, in float32, rounded once to ``dtype``."""
        salient = unpack_bits(self.salient, self.columns)
        n_salient = int(salient.sum())
        group = torch.full((self.rows, self.columns), FIRST, dtype=torch.int64, device=self.signs.device)
        bitmap = unpack_bits(self.bitmap, self.rows * (self.columns - n_salient)).view(self.rows, -1)
        group[:, ~salient] = torch.where(bitmap, SPARSE, DENSE)
        out = self._term(_signs(self.signs, (self.rows, self.columns), self.zeros), group)
        if n_salient:
            second = _signs(self.residual, (self.rows, n_salient), self.zeros_second)
            wide = torch.zeros_like(group, dtype=torch.int8)
            wide[:, salient] = second
            out[:, salient] += self._term(wide, group.fill_(SECOND))[:, salient]
        return out.to(dtype)

    def _term(self, signs: Int8[Tensor, "rows columns"], group: Int64[Tensor, "rows columns"]) -> Tensor:
        out = self._of_group(self.scale, group) * signs
        return out if self.mean is None else out + self._of_group(self.mean, group)

    def _of_group(self, numbers: Tensor, group: Tensor) -> Tensor:
        wide = numbers.float().repeat_interleave(self.block_size, dim=2)[:, :, : self.columns]
        return wide.gather(0, group[None])[0]


def pack_bits(bits: Bool[Tensor, "..."]) -> UInt8[Tensor, " bytes"]:
    """All of them one after the other, eight a byte, the first the lowest; the last byte is filled up with zeros.

    The bytes of `bitnet.quant.packing.pack` in layout b1, without its check of the codes, which takes longer.
    """
    bytes_ = functional.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (bytes_ << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, " bytes"], count: int) -> Bool[Tensor, " count"]:
    """The first ``count`` bits."""
    return unpack(packed, "b1", count) > 0


def _signs(packed: Tensor, shape: tuple[int, int], zeros: Int32[Tensor, "n 2"]) -> Int8[Tensor, "rows columns"]:
    signs = unpack(packed, "b1", shape[0] * shape[1]).view(shape)
    signs[tuple(zeros.long().t())] = 0
    return signs
