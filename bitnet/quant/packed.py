"""Ternary and sign weights as the bytes that a file holds and a kernel reads."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bitnet.errors import InputError
from bitnet.quant.packing import LAYOUTS, pack, packed_columns, unpack
from bitnet.quant.types import QTensor

DEFAULT_LAYOUTS = {2: "b1", 3: "i2"}  # by the number of levels; t5 is smaller than i2, and slower to read


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """Packed codes [out, in] and what multiplies them.

    Attributes:
        packed: uint8 [out, bytes of a row], in ``layout``.
        scale: float32 [1, 1] or [out, 1].
        layout: "i2" or "t5" (ternary), "b1" (signs); drawn in `bitnet.quant.packing`.
        columns: in_features.

    Raises:
        InputError: an unknown layout, or rows that are not as long as ``columns`` needs.
    """

    packed: UInt8[Tensor, "out bytes"]
    scale: Float[Tensor, "scale_rows 1"]
    layout: str
    columns: int

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        needed = packed_columns(self.columns, self.layout)
        if self.packed.shape[-1] != needed:
            raise InputError(
                f"{self.columns} columns take {needed} bytes a row in layout {self.layout}, got {self.packed.shape[-1]}"
            )

    @classmethod
    def of(cls, weight: QTensor, layout: str | None = None) -> "PackedTensor":
        """Pack ``weight``; None chooses "i2" for ternary codes and "b1" for signs.

        Raises:
            InputError: codes that are neither, scales of groups, a zero point, or codes that ``layout`` cannot hold.
        """
        if not is_packable(weight):
            raise InputError(
                "expected ternary or sign codes with one scale a tensor or row and no zero point to pack, got "
                f"{weight.levels} levels, group size {weight.group_size}"
                f"{'' if weight.zero_point is None else ' and a zero point'}: such a layer stays a QuantizedLinear"
            )
        layout = DEFAULT_LAYOUTS[weight.levels] if layout is None else layout
        scale = weight.scale.float().reshape(-1, 1)
        return cls(pack(weight.qdata, layout), scale, layout, weight.shape[-1])

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return torch.Size((self.packed.shape[0], self.columns))

    @property
    def bits_per_weight(self) -> float:
        """Bits of the bytes and of the scales, divided by weights."""
        stored = self.packed.numel() * 8 + self.scale.numel() * 32
        return stored / self.shape.numel()

    def unpack(self) -> QTensor:
        """Codes and scale.

        Raises:
            InputError: bytes that no codes pack to.
        """
        codes = unpack(self.packed, self.layout, self.columns)
        return QTensor(codes, self.scale, levels=len(LAYOUTS[self.layout].codes))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The values, computed in float32 and rounded once to ``dtype``."""
        return self.unpack().dequantize(dtype)


def is_packable(weight: QTensor) -> bool:
    """Whether `PackedTensor` can hold ``weight``: ternary or sign codes, one scale a tensor or row, no zero point."""
    return weight.levels in DEFAULT_LAYOUTS and weight.zero_point is None and weight.group_size is None
