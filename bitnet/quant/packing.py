"""Codes in as few bytes as they need: ``i2``, ``t5``, ``b1``, ``o2``, and ``u2`` to ``u8``.

Every layout packs each row by itself, column by column in order, and fills the row's last byte up with zeros.
Packing is a re-ordering of the same codes: ``unpack(pack(codes)) == codes`` for every shape, and a byte that no code
can produce is refused when read.

::

    i2   2.0 bits a weight   byte j = c[4j] | c[4j+1] << 2 | c[4j+2] << 4 | c[4j+3] << 6         c = t + 1, never 3
    t5   1.6 bits a weight   byte j = c[5j] + 3 c[5j+1] + 9 c[5j+2] + 27 c[5j+3] + 81 c[5j+4]    c = t + 1, byte <= 242
    b1   1.0 bit a weight    byte j = b[8j] | b[8j+1] << 1 | ... | b[8j+7] << 7                  b = 1 for +1, 0 for -1
    o2   2.0 bits a weight   byte j = c[4j] | c[4j+1] << 2 | c[4j+2] << 4 | c[4j+3] << 6         c = (t + 3) / 2
    uN   N bits a weight     bits N k to N k + N - 1 of a row, the lowest first, hold code k + 2^(N-1)      N = 2 to 8
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Int8, UInt8
from torch import Tensor

from bitnet.errors import InputError


@dataclass(frozen=True, slots=True)
class Layout:
    """A byte holds ``per_byte`` digits in base ``base``, the first column's lowest; digit d stands for ``codes[d]``."""

    name: str
    codes: tuple[int, ...]
    base: int
    per_byte: int

    @property
    def step(self) -> int:
        return self.codes[1] - self.codes[0]


I2 = Layout("i2", codes=(-1, 0, 1), base=4, per_byte=4)
T5 = Layout("t5", codes=(-1, 0, 1), base=3, per_byte=5)
B1 = Layout("b1", codes=(-1, 1), base=2, per_byte=8)
O2 = Layout("o2", codes=(-3, -1, 1, 3), base=4, per_byte=4)
LAYOUTS = {layout.name: layout for layout in (I2, T5, B1)}  # those that kernels read
PIECE = 1 << 22  # codes converted at a time
INTEGERS = {f"u{bits}": bits for bits in range(2, 9)}  # layout -> bits a code


def pack(codes: Int8[Tensor, "*rows cols"], layout: str) -> UInt8[Tensor, "*rows bytes"]:
    """Pack codes into ``ceil(cols / per_byte)`` bytes a row.

    Raises:
        InputError: an unknown layout, or a code that the layout cannot hold.
    """
    if layout in INTEGERS:
        return _by_rows(lambda rows: _pack_integers(rows, INTEGERS[layout]), codes)
    return _by_rows(lambda rows: _pack_digits(rows, _layout(layout)), codes)


def _pack_digits(codes: Tensor, form: Layout) -> Tensor:
    digits = codes - form.codes[0]  # int8: -1 becomes 0
    wrong = (digits < 0) | (digits > form.step * (len(form.codes) - 1)) | (digits % form.step != 0)
    if wrong.any():
        raise InputError(
            f"layout {form.name} holds the codes {form.codes}, got codes from {codes.min()} to {codes.max()}"
        )
    digits = (digits // form.step).to(torch.uint8)
    digits = F.pad(digits, (0, -codes.shape[-1] % form.per_byte)).unflatten(-1, (-1, form.per_byte))
    return (digits * _place_values(form).to(codes.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, "*rows bytes"], layout: str, columns: int) -> Int8[Tensor, "*rows cols"]:
    """Codes of the first ``columns`` columns of every row.

    Raises:
        InputError: an unknown layout, a row of another length than ``columns`` needs, or bytes that no codes pack to.
    """
    expected = packed_columns(columns, layout)
    if packed.shape[-1] != expected:
        raise InputError(f"{columns} columns take {expected} bytes a row in layout {layout}, got {packed.shape[-1]}")
    if layout in INTEGERS:
        return _by_rows(lambda rows: _unpack_integers(rows, INTEGERS[layout], columns), packed)
    return _by_rows(lambda rows: _unpack_digits(rows, _layout(layout), columns), packed)


def _unpack_digits(packed: Tensor, form: Layout, columns: int) -> Tensor:
    """By a table with a line of codes for every byte."""
    lines, valid = _tables(form)
    index = packed.flatten().to(torch.int32)
    codes = lines.to(packed.device).index_select(0, index).reshape(*packed.shape[:-1], packed.shape[-1] * form.per_byte)
    beyond = codes[..., columns:] != form.codes[0]
    if not valid.to(packed.device).index_select(0, index).all() or beyond.any():
        raise InputError(
            f"the bytes are not ternary or sign codes in layout {form.name}: the file is damaged or of another layout"
        )
    return codes[..., :columns].contiguous()


def packed_columns(columns: int, layout: str) -> int:
    """Bytes that a row of ``columns`` codes takes in ``layout``."""
    if layout in INTEGERS:
        return -(-columns * INTEGERS[layout] // 8)
    return -(-columns // _layout(layout).per_byte)


def packed_bits(shape: Sequence[int], levels: int) -> int:
    """Bits that codes of this shape take in their densest packing: ``b1``, ``t5``, or ceil(log2(levels)) bits each."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    for form in (B1, T5):
        if levels == len(form.codes):
            return rows * math.ceil(columns / form.per_byte) * 8
    return rows * math.ceil(columns * math.ceil(math.log2(levels)) / 8) * 8


def _pack_integers(codes: Tensor, bits: int) -> Tensor:
    low = -(2 ** (bits - 1))
    if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) < -low:
        raise InputError(
            f"layout u{bits} holds codes from {low} to {-low - 1}, got codes from {codes.min()} to {codes.max()}"
        )
    columns = codes.shape[-1]
    shifts = torch.arange(8, device=codes.device)
    eights = F.pad(codes.to(torch.int64) - low, (0, -columns % 8)).unflatten(-1, (-1, 8))
    words = (eights << (bits * shifts)).sum(-1)  # eight codes: bits bytes
    row = (words[..., None] >> (8 * shifts[:bits])) & 255
    return row.flatten(-2)[..., : packed_columns(columns, f"u{bits}")].to(torch.uint8)


def _unpack_integers(packed: Tensor, bits: int, columns: int) -> Tensor:
    shifts = torch.arange(8, device=packed.device)
    row = F.pad(packed.to(torch.int64), (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    words = (row << (8 * shifts[:bits])).sum(-1)
    digits = ((words[..., None] >> (bits * shifts)) & (2**bits - 1)).flatten(-2)
    if bool((digits[..., columns:] != 0).any()):
        raise InputError(f"the bytes beyond the last code are not 0 in layout u{bits}: the file is damaged")
    return (digits[..., :columns] - 2 ** (bits - 1)).to(torch.int8)


def _by_rows(convert: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``convert(x)`` in pieces of whole rows: what it computes with is up to eight times as wide as the codes."""
    if x.numel() <= PIECE or x.dim() == 1:
        return convert(x)
    rows = x.flatten(0, -2)
    return torch.cat([convert(each) for each in rows.split(max(1, PIECE // x.shape[-1]))]).unflatten(0, x.shape[:-1])


def _layout(name: str) -> Layout:
    layouts = {**LAYOUTS, O2.name: O2}
    if name not in layouts:
        raise InputError(f"layout must be one of {', '.join([*layouts, *INTEGERS])}, got {name!r}")
    return layouts[name]


def _place_values(form: Layout) -> Tensor:
    return torch.tensor([form.base**place for place in range(form.per_byte)], dtype=torch.uint8)


@cache
def _tables(form: Layout) -> tuple[Tensor, Tensor]:
    """Codes [256, per_byte] that each byte stands for, int8, and whether it stands for any, bool [256]."""
    byte = torch.arange(256)[:, None]
    digits = byte // _place_values(form).long()
    valid = digits[:, -1] < form.base  # the highest digit stays whole: too large a byte shows there
    digits %= form.base
    valid &= (digits < len(form.codes)).all(-1)
    return (digits * form.step + form.codes[0]).to(torch.int8), valid
