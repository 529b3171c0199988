"""The tensor types of GGUF that are written and read here: their numbers and sizes.

Numbers and blocks are ggml's (``ggml.h``, ``ggml-common.h``); I2_S is bitnet.cpp's, a fork of llama.cpp.
"""

from dataclasses import dataclass
from math import prod

import torch

from bitnet.errors import InputError


@dataclass(frozen=True, slots=True)
class TensorType:
    """One type.

    Attributes:
        name: as ggml calls it.
        number: what the file says.
        block: consecutive weights of a row that are stored together.
        nbytes: bytes a block.
        tail: bytes after the last block of a tensor.
        file_type: ``general.file_type`` of a file whose matrices are mostly of this type; informative only.
    """

    name: str
    number: int
    block: int
    nbytes: int
    tail: int = 0
    file_type: int = 1024

    @property
    def bits(self) -> float:
        """Stored bits a weight."""
        return self.nbytes * 8 / self.block

    def row(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.block * self.nbytes

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of ``shape`` (the last dimension is the row)."""
        return prod(shape[:-1]) * self.row(shape[-1]) + self.tail


TYPES = {
    each.name: each
    for each in (
        TensorType("F32", 0, 1, 4, file_type=0),
        TensorType("F16", 1, 1, 2, file_type=1),
        TensorType("BF16", 30, 1, 2, file_type=32),
        TensorType("Q4_0", 2, 32, 18, file_type=2),
        TensorType("Q8_0", 8, 32, 34, file_type=7),
        TensorType("Q2_K", 10, 256, 84, file_type=10),
        TensorType("Q3_K", 11, 256, 110, file_type=12),
        TensorType("Q4_K", 12, 256, 144, file_type=15),
        TensorType("Q5_K", 13, 256, 176, file_type=17),
        TensorType("Q6_K", 14, 256, 210, file_type=18),
        TensorType("TQ1_0", 34, 256, 54, file_type=36),
        TensorType("TQ2_0", 35, 256, 66, file_type=37),
        TensorType("I2_S", 36, 128, 32, tail=32, file_type=40),
        TensorType("Q1_0", 41, 128, 18, file_type=40),
        TensorType("Q2_0", 42, 64, 18, file_type=41),
    )
}
NUMBERS = {each.number: each for each in TYPES.values()}
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TERNARY = ("TQ2_0", "TQ1_0", "Q2_0", "I2_S")
SIGNS = ("Q1_0", *TERNARY)


PIECE = 4096  # rows of an embedding that are looked at together: no second embedding in memory


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(torch.isfinite(part).all()) for part in values.split(PIECE))


def tensor_type(name: str) -> TensorType:
    """The type of that name.

    Raises:
        InputError: there is none.
    """
    if name not in TYPES:
        raise InputError(f"a GGUF type must be one of {', '.join(TYPES)}, got {name!r}")
    return TYPES[name]
