"""Quantized weights as the bytes of a GGUF type, and back: re-ordered, never quantized again.

A scale has two places. One scale for a whole matrix goes, in float32, into a tensor ``.scale`` of its own beside the
codes, and every block's own scale d is 1: nothing is rounded. Scales of rows or groups have to be exact in float16,
since d is; they are repeated for every block that they cover. What a type must be able to hold are the codes::

    Q1_0              -1, +1          blocks of 128       ternary     TQ2_0 TQ1_0 (256)   Q2_0 (64)   I2_S (128)
    Q4_0              -8 .. 7         blocks of 32        Q8_0        -127 .. 127 (32)

With a zero point z the code is q - z, so that three bits with zero points fit Q4_0, and four to seven fit Q8_0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.errors import InputError
from bitnet.export.gguf.types import DENSE, SIGNS, TERNARY, TensorType, tensor_type
from bitnet.quant import PackedTensor, QTensor, QuantizedWeight, pack, unpack
from bitnet.quant.ggml import Fields, GGMLWeight
from bitnet.quant.ggml import pack as pack_fields
from bitnet.quant.ggml import unpack as unpack_fields

RANGES = {"Q4_0": (-8, 7), "Q8_0": (-127, 127)}
AUTOMATIC = {2: ("Q1_0", "Q2_0"), 3: ("TQ2_0", "Q2_0")}  # by levels: the first whose blocks fit rows and groups
CODES_AS_DIGITS = {"Q1_0": "b1", "Q2_0": "i2"}  # d in front of the bytes of a layout of `bitnet.quant.packing`


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a file holds of a weight: ``data`` uint8 [rows, bytes of a row], and the number of the `.scale` tensor."""

    type: TensorType
    data: Tensor
    scale: float | None


@dataclass(frozen=True, slots=True)
class Grid:
    """What has to be known of a `QTensor` to say where it fits; ``scale`` are its real values, or None (not known yet).

    ``scales`` are the rows and groups of the scale, ``half`` says that they are float16 whatever their values; ``low``
    to ``high`` the range of its codes less zero points.
    """

    levels: int
    low: int
    high: int
    columns: int
    scales: tuple[int, int]
    group_size: int | None
    scale: Tensor | None
    half: bool = False

    @classmethod
    def of(cls, weight: QTensor | PackedTensor, *, values: bool = True) -> "Grid":
        """``values`` False: the codes and scales are an example's, only their shapes count."""
        if isinstance(weight, PackedTensor):
            levels = 2 if weight.layout == "b1" else 3
            return cls(levels, -1, 1, weight.columns, (len(weight.scale), 1), None, weight.scale)
        low, high = -(weight.levels // 2), (weight.levels - 1) // 2
        if weight.levels == 2 or weight.odd:
            low, high = 1 - weight.levels, weight.levels - 1
        if weight.zero_point is not None:
            low, high = low - high, high - low
        scale = weight.scale.reshape(-1, weight.scale.shape[-1])
        shape = (scale.shape[0], scale.shape[1])
        half, known = weight.scale.dtype == torch.float16, scale if values else None
        return cls(weight.levels, low, high, weight.shape[-1], shape, weight.group_size, known, half)

    def fits(self, chosen: TensorType) -> bool:
        """Whether rows and groups are whole numbers of blocks."""
        grouped = self.group_size is not None and self.scales[1] > 1
        return self.columns % chosen.block == 0 and not (grouped and (self.group_size or 0) % chosen.block)


def type_for(weight: QuantizedWeight | Grid, wanted: str, scale: str) -> TensorType:
    """The type that carries ``weight`` without loss.

    Args:
        wanted: "auto", or a ternary type.
        scale: "tensor", or "block": d of every block is the scale rounded to float16.

    Raises:
        InputError: there is none, with the reason and what would make it fit.
    """
    if isinstance(weight, GGMLWeight):
        return _ready_made(weight, wanted)
    if isinstance(weight, QTensor | PackedTensor):
        weight = Grid.of(weight)
    if not isinstance(weight, Grid):
        raise InputError(f"{type(weight).__name__} has no GGUF type: quantize with ptq=kquant for llama.cpp")
    chosen = tensor_type(_named(weight, wanted))
    if weight.columns % chosen.block:
        raise InputError(
            f"in_features must be a multiple of {chosen.block} for {chosen.name}, got {weight.columns}: "
            + ("type=Q2_0 asks for 64" if chosen.block > 64 and weight.columns % 64 == 0 else "leave the layer dense")
        )
    _refuse_misplaced_scales(weight, chosen, scale)
    return chosen


def _ready_made(weight: GGMLWeight, wanted: str) -> TensorType:
    if wanted != "auto" and wanted != weight.type:
        raise InputError(f"it is {weight.type} already, and not quantized again: set type=auto instead of {wanted}")
    if not weight.exportable:
        raise InputError(
            f"in_features must be a multiple of {weight.format.block} for {weight.type}, got {weight.columns}: "
            "quantize the layer to Q8_0 or Q4_0 (32), or leave it dense"
        )
    return tensor_type(weight.type)


def _named(grid: Grid, wanted: str) -> str:
    """The type's name for these codes."""
    if wanted != "auto" and grid.levels in AUTOMATIC and (grid.low, grid.high) == (-1, 1):
        if wanted == "Q1_0" and grid.levels != 2:
            raise InputError("Q1_0 has no zero: it holds signs (BitNet b1) only; ternary weights take type=TQ2_0")
        return wanted
    if wanted != "auto":
        raise InputError(f"{wanted} holds ternary codes, and there are {grid.levels} levels here: set type=auto")
    if grid.levels in AUTOMATIC and (grid.low, grid.high) == (-1, 1):
        return next(
            (name for name in AUTOMATIC[grid.levels] if grid.fits(tensor_type(name))), AUTOMATIC[grid.levels][0]
        )
    for name, (low, high) in RANGES.items():
        if low <= grid.low and grid.high <= high:
            return name
    raise InputError(
        f"codes from {grid.low} to {grid.high} fit no GGUF type: 8 bits must be symmetric and restricted "
        "(ptq=absmax), or quantize with ptq=kquant"
    )


def _refuse_misplaced_scales(grid: Grid, chosen: TensorType, scale: str) -> None:
    if scale == "tensor" and grid.scales == (1, 1):
        return
    if chosen.name == "I2_S":
        raise InputError("I2_S has one float32 scale a matrix: quantize with granularity tensor, and set scale=tensor")
    if grid.group_size is not None and grid.scales[1] > 1 and grid.group_size % chosen.block:
        raise InputError(
            f"groups of {grid.group_size} columns do not end where blocks of {chosen.name} ({chosen.block}) do: "
            f"choose a group size that is a multiple of {chosen.block}"
        )
    if grid.scale is None:
        if scale == "tensor" and not grid.half:
            raise InputError(
                "llama.cpp has one float32 scale a matrix, and there is one a row or group here: train with "
                "granularity tensor, or set scale=block, which rounds every scale to float16 (by up to 0.05 %)"
            )
        return
    half = grid.scale.to(torch.float16)
    if not bool((torch.isfinite(half) & (half > 0)).all()):
        raise InputError("a scale is too large or too small for the float16 that blocks have: set scale=tensor")
    if scale == "tensor" and not torch.equal(half.float(), grid.scale.float()):
        raise InputError(
            "scales of rows or groups must be exact in float16 (ptq.scale_dtype=float16 makes them so); one float32 "
            "scale a matrix would fit, too; scale=block rounds these (by up to 0.05 %)"
        )


def encode(weight: QuantizedWeight, chosen: TensorType, scale: str) -> Encoded:
    """The bytes of ``weight`` in a type that `type_for` chose."""
    if isinstance(weight, GGMLWeight):
        return Encoded(chosen, weight.data, None)
    codes, scales = _codes_and_scales(weight)
    alone = scale == "tensor" and scales.numel() == 1
    if chosen.name == "I2_S":
        return Encoded(chosen, _pack_i2_s(codes), float(scales))
    rows, blocks = codes.shape[0], codes.shape[-1] // chosen.block
    d = torch.ones(1, 1) if alone else scales
    if d.shape[-1] > 1:
        size = weight.group_size if isinstance(weight, QTensor) else None
        assert size is not None
        d = d.repeat_interleave(size // chosen.block, dim=-1)[:, :blocks]
    d = d.to(torch.float16).expand(rows, blocks)
    return Encoded(chosen, _PACK.get(chosen.name, _pack_blocks)(codes, d, chosen), float(scales) if alone else None)


def meant(weight: QuantizedWeight, scale: str) -> QuantizedWeight:
    """What has to be read back: ``weight`` itself, or with ``scale`` "block" its scales rounded to float16."""
    if isinstance(weight, GGMLWeight):
        return weight
    codes, scales = _codes_and_scales(weight)
    size = weight.group_size if isinstance(weight, QTensor) else None
    odd = isinstance(weight, QTensor) and weight.odd
    scales = scales.to(torch.float16).float() if scale == "block" else scales
    return QTensor(codes, scales, weight.levels if isinstance(weight, QTensor) else 3, None, size, odd)


def _codes_and_scales(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Codes less zero points, int8; scales float32 [rows or 1, groups]."""
    weight = weight.unpack() if isinstance(weight, PackedTensor) else weight
    assert isinstance(weight, QTensor)
    codes = weight.qdata
    if weight.zero_point is not None:
        codes = (codes.short() - weight.per_column(weight.zero_point).short()).to(torch.int8)
    return codes, weight.scale.float().reshape(-1, weight.scale.shape[-1])


def decode(data: Tensor, found: TensorType, columns: int, scale: float | None, name: str) -> Tensor | QuantizedWeight:
    """What bytes mean: values of a dense type, else a `GGMLWeight`, or of ternary types and with ``scale`` a `QTensor`.

    Args:
        data: uint8 [rows, bytes of a row], without a tail.
        scale: the number of the tensor ``.scale``; with it every block's own scale must be 1.
        name: of the tensor, for messages.

    Raises:
        InputError: a code that the type does not have, a scale that is negative, NaN or infinite.
    """
    if found.name in DENSE:
        return data.contiguous().view(DENSE[found.name])
    if found.name not in SIGNS and scale is None:
        weight = GGMLWeight(data, found.name, columns)
        _refuse_infinite_scales(weight, name)
        return weight
    codes, d = _UNPACK.get(found.name, _unpack_blocks)(data, found, name)
    levels = {"Q1_0": 2, "Q4_0": 16, "Q8_0": 255}.get(found.name, 3)
    if found.name in TERNARY and codes.numel() and int(codes.max()) > 1:
        raise InputError(f"{name}: {found.name} holds the codes -1, 0 and +1 here, got 2: the file is damaged")
    if d is None or (scale is not None and bool((d == 1).all())):
        assert scale is not None
        return QTensor(codes, torch.full((1, 1), scale), levels)
    if scale is not None:
        raise InputError(f"{name}: with a tensor .scale beside it every block's scale must be 1, and they are not")
    return _with_block_scales(codes, d.float(), found, levels, name)


def _with_block_scales(codes: Tensor, d: Tensor, found: TensorType, levels: int, name: str) -> QTensor:
    idle = (d == 0) & (codes.unflatten(-1, (-1, found.block)) == 0).all(-1)  # blocks of zeros, as llama.cpp writes them
    if not bool((torch.isfinite(d) & ((d > 0) | idle)).all()):
        raise InputError(f"{name}: block scales of {found.name} must be positive and finite: the file is damaged")
    d = torch.where(idle, 1.0, d)
    if bool((d == d[:1, :1]).all()):
        return QTensor(codes, d[:1, :1].clone(), levels)
    return QTensor(codes, d, levels, None, found.block)


def _refuse_infinite_scales(weight: GGMLWeight, name: str) -> None:
    fields = weight.fields()
    for d in (fields.d, fields.dmin):
        if d is not None and not bool(torch.isfinite(d).all()):
            raise InputError(f"{name}: a block's scale is NaN or infinite: the file is damaged")


def _pack_blocks(codes: Tensor, d: Tensor, chosen: TensorType) -> Tensor:
    return pack_fields(Fields(codes.unflatten(-1, (-1, chosen.block)), d.contiguous()), chosen.name)


def _unpack_blocks(data: Tensor, found: TensorType, name: str) -> tuple[Tensor, Tensor]:
    fields = unpack_fields(data, found.name)
    if found.name == "TQ1_0" and not torch.equal(pack_fields(fields, "TQ1_0"), data):
        raise InputError(f"{name}: a byte of TQ1_0 stands for no five trits: the file is damaged")
    if found.name == "Q8_0" and fields.codes.numel() and int(fields.codes.min()) == -128:
        raise InputError(f"{name}: the code -128, which Q8_0 does not have: the file is damaged")
    return fields.codes.flatten(-2), fields.d


def _pack_digits(codes: Tensor, d: Tensor, chosen: TensorType) -> Tensor:
    digits = pack(codes, CODES_AS_DIGITS[chosen.name]).unflatten(-1, (-1, chosen.nbytes - 2))
    return torch.cat([d.contiguous().view(torch.uint8).unflatten(-1, (-1, 2)), digits], dim=-1).flatten(-2)


def _unpack_digits(data: Tensor, found: TensorType, name: str) -> tuple[Tensor, Tensor]:
    blocks = data.unflatten(-1, (-1, found.nbytes))
    digits = blocks[..., 2:].flatten(-2)
    if found.name == "Q2_0" and bool(((digits & (digits >> 1) & 0x55) != 0).any()):
        raise InputError(f"{name}: Q2_0 holds the codes -1, 0 and +1 here, got 2: the file is damaged")
    columns = blocks.shape[-2] * found.block
    return unpack(digits, CODES_AS_DIGITS[found.name], columns), blocks[..., :2].contiguous().view(torch.float16)[
        ..., 0
    ]


def _pack_i2_s(codes: Tensor) -> Tensor:
    """Byte p of 32 holds the codes p, 32 + p, 64 + p, 96 + p of 128, the first in the highest bits (x86)."""
    runs = (codes + 1).view(torch.uint8).unflatten(-1, (-1, 4, 32))
    return (runs << _I2_S_SHIFTS[:, None]).sum(-2, dtype=torch.uint8).flatten(-2)


def _unpack_i2_s(data: Tensor, found: TensorType, name: str) -> tuple[Tensor, None]:
    runs = (data.unflatten(-1, (-1, 1, 32)) >> _I2_S_SHIFTS[:, None]) & 3
    return (runs.view(torch.int8) - 1).flatten(-3), None


def i2_s_tail(scale: float) -> Tensor:
    """The 32 bytes after the codes of a tensor: the float32 scale and zeros."""
    return torch.cat([torch.tensor([scale], dtype=torch.float32).view(torch.uint8), torch.zeros(28, dtype=torch.uint8)])


_I2_S_SHIFTS = torch.tensor([6, 4, 2, 0], dtype=torch.uint8)
_PACK: dict[str, Callable[[Tensor, Tensor, TensorType], Tensor]] = {"Q1_0": _pack_digits, "Q2_0": _pack_digits}
_UNPACK: dict[str, Callable[[Tensor, TensorType, str], tuple[Tensor, Tensor | None]]] = {
    "Q1_0": _unpack_digits,
    "Q2_0": _unpack_digits,
    "I2_S": _unpack_i2_s,
}
