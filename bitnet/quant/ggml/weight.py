"""A weight matrix as the bytes that a GGUF file holds for it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from bitnet.errors import InputError
from bitnet.quant.ggml.formats import BlockFormat, Fields, block_format
from bitnet.quant.ggml.layouts import pack, unpack


@dataclass(frozen=True, slots=True)
class GGMLWeight:
    """Blocks of a GGUF type, row by row.

    Where ``columns`` is no multiple of the block, the last block of every row is filled up: its bytes are stored and
    counted all the same. Such a matrix works here but has no place in a GGUF file (``exportable``).

    Attributes:
        data: uint8 [out, bytes of a row], as in `bitnet.quant.ggml.layouts`.
        type: the name of the GGUF type, for example "Q4_K".
        columns: in_features.

    Raises:
        InputError: an unknown type, or rows that are not as long as ``columns`` needs.
    """

    data: UInt8[Tensor, "out bytes"]
    type: str
    columns: int

    def __post_init__(self) -> None:
        needed = -(-self.columns // self.format.block) * self.format.nbytes
        if self.data.shape[-1] != needed:
            raise InputError(
                f"{self.columns} columns of {self.type} take {needed} bytes a row, got {self.data.shape[-1]}"
            )

    @classmethod
    def from_fields(cls, fields: Fields, type: str, columns: int) -> "GGMLWeight":
        """Pack ``fields``."""
        return cls(pack(fields, type), type, columns)

    @property
    def format(self) -> BlockFormat:
        return block_format(self.type)

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return torch.Size((self.data.shape[0], self.columns))

    @property
    def bits_per_weight(self) -> float:
        """Bytes times 8 divided by weights; the columns that fill up the last block are no weights."""
        return self.data.shape[-1] * 8 / self.columns

    @property
    def exportable(self) -> bool:
        """True where GGUF can hold it: every row is a whole number of blocks."""
        return self.columns % self.format.block == 0

    def fields(self) -> Fields:
        """Codes and scales, unpacked."""
        return unpack(self.data, self.type)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The values, bit for bit those of ggml's dequantizers: computed in float32 and rounded once to ``dtype``."""
        return self.fields().values().flatten(-2)[..., : self.columns].to(dtype)


def in_blocks(weight: Float[Tensor, "out in"], form: BlockFormat) -> Float[Tensor, "out blocks block"]:
    """float32 [out, blocks, weights of a block], the last block filled up with zeros."""
    return F.pad(weight.float(), (0, -weight.shape[-1] % form.block)).unflatten(-1, (-1, form.block))
