"""The bytes of a block, exactly as GGUF files and ggml's kernels have them.

Multi-byte numbers are little-endian. Codes narrower than a byte are *interleaved*: a stretch of ``n`` bytes holds
``8 / bits`` runs of ``n`` consecutive codes, run k in the bits from ``k * bits`` on, so that byte i holds the codes
i, i + n, i + 2n ... of the stretch. In the drawings u is the code plus the format's constant offset, and
``[runs x bytes]`` one stretch::

    Q2_K   84   scale | min << 4 [16]    u, 2 bits [4 x 32] [4 x 32]    d   dmin
    Q3_K  110   u >> 2, 1 bit [8 x 32]   u & 3, 2 bits [4 x 32] [4 x 32]    scales (below) [12]    d
    Q4_K  144   d   dmin   scales and mins (below) [12]    u, 4 bits [2 x 32] four times
    Q5_K  176   d   dmin   scales and mins (below) [12]    u >> 4, 1 bit [8 x 32]    u & 15, 4 bits [2 x 32] four times
    Q6_K  210   u & 15, 4 bits [2 x 64] [2 x 64]    u >> 4, 2 bits [4 x 32] [4 x 32]    scales, int8 [16]    d
    Q8_0   34   d   codes, int8 [32]
    Q4_0   18   d   u, 4 bits [2 x 16]
    TQ1_0  54   trits [5 x 32] [5 x 16] [4 x 4]    d        byte = ceil(256/243 * sum of u_k 3^(4-k))
    TQ2_0  66   u, 2 bits [4 x 32] [4 x 32]    d

    scales and mins of Q4_K and Q5_K: eight of 6 bits, s and m; for i = 0..3
    byte i         s[i] | (s[i+4] >> 4) << 6
    byte 4 + i     m[i] | (m[i+4] >> 4) << 6
    byte 8 + i     s[i+4] & 15 | (m[i+4] & 15) << 4

    scales of Q3_K: sixteen of 6 bits, s = scale + 32
    byte i         s[i] & 15 | (s[i+8] & 15) << 4                                                    i = 0..7
    byte 8 + i     s[i] >> 4 | (s[i+4] >> 4) << 2 | (s[i+8] >> 4) << 4 | (s[i+12] >> 4) << 6         i = 0..3
"""

from collections.abc import Callable

import torch
from jaxtyping import UInt8
from torch import Tensor

from bitnet.errors import InputError
from bitnet.quant.ggml.formats import Fields, block_format


def pack(fields: Fields, type: str) -> UInt8[Tensor, "rows bytes"]:
    """The bytes of every row.

    Raises:
        InputError: an unknown type, or a code, scale or minimum outside its range.
    """
    form = block_format(type)
    _refuse_outside(fields.codes, form.low, form.high, f"codes of {type}")
    if form.scales is not None:
        _refuse_outside(fields.scales, *form.scales, f"scales of {type}")
    if form.mins is not None:
        _refuse_outside(fields.mins, 0, form.mins, f"minima of {type}")
    return torch.cat(_PACK[type](fields), dim=-1).flatten(-2)


def unpack(data: UInt8[Tensor, "rows bytes"], type: str) -> Fields:
    """What the bytes say. Any bytes can be read; `pack` gives those back that hold codes of the type.

    Others are a code of -128 in Q8_0 and of 2 in TQ2_0, which no quantizer makes, and the 13 bytes of TQ1_0 that are no
    five trits.

    Raises:
        InputError: an unknown type, or rows that are no whole number of blocks.
    """
    form = block_format(type)
    if data.shape[-1] % form.nbytes:
        raise InputError(f"rows of {type} are a multiple of {form.nbytes} bytes, got {data.shape[-1]}: another type?")
    return _UNPACK[type](data.unflatten(-1, (-1, form.nbytes)))


def _refuse_outside(numbers: Tensor | None, low: int, high: int, what: str) -> None:
    if numbers is None:
        raise InputError(f"{what} are missing")
    if numbers.numel() and (int(numbers.min()) < low or int(numbers.max()) > high):
        raise InputError(f"{what} are {low} to {high}, got {int(numbers.min())} to {int(numbers.max())}")


def _interleave(digits: Tensor, bits: int, width: int) -> Tensor:
    """uint8 [..., n] of ``bits`` bits each -> uint8 [..., n * bits / 8] in stretches of ``width`` bytes."""
    runs = digits.unflatten(-1, (-1, 8 // bits, width))
    return (runs << _shifts(bits, runs)).sum(-2, dtype=torch.uint8).flatten(-2)


def _deinterleave(data: Tensor, bits: int, width: int) -> Tensor:
    """The reverse of `_interleave`."""
    stretches = data.unflatten(-1, (-1, 1, width))
    return ((stretches >> _shifts(bits, data)) & (2**bits - 1)).flatten(-3)


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)[:, None]


def _unsigned(codes: Tensor | None, offset: int = 0) -> Tensor:
    assert codes is not None
    return (codes + offset).view(torch.uint8)


def _signed(digits: Tensor, offset: int = 0) -> Tensor:
    return digits.contiguous().view(torch.int8) - offset


def _half(number: Tensor | None) -> Tensor:
    assert number is not None
    return number[..., None].contiguous().view(torch.uint8)


def _unhalf(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16)[..., 0]


def _pack_q2_k(f: Fields) -> list[Tensor]:
    scales = _unsigned(f.scales) | (_unsigned(f.mins) << 4)
    return [scales, _interleave(_unsigned(f.codes), 2, 32), _half(f.d), _half(f.dmin)]


def _unpack_q2_k(b: Tensor) -> Fields:
    codes = _signed(_deinterleave(b[..., 16:80], 2, 32))
    scales, mins = _signed(b[..., :16] & 15), _signed(b[..., :16] >> 4)
    return Fields(codes, _unhalf(b[..., 80:82]), scales, _unhalf(b[..., 82:84]), mins)


def _pack_q3_k(f: Fields) -> list[Tensor]:
    u, s = _unsigned(f.codes, 4), _unsigned(f.scales, 32)
    low = (s[..., :8] & 15) | ((s[..., 8:] & 15) << 4)
    high = _interleave(s >> 4, 2, 4)
    return [_interleave(u >> 2, 1, 32), _interleave(u & 3, 2, 32), low, high, _half(f.d)]


def _unpack_q3_k(b: Tensor) -> Fields:
    u = _deinterleave(b[..., 32:96], 2, 32) | (_deinterleave(b[..., :32], 1, 32) << 2)
    s = _deinterleave(b[..., 96:104], 4, 8) | (_deinterleave(b[..., 104:108], 2, 4) << 4)
    return Fields(_signed(u, 4), _unhalf(b[..., 108:110]), _signed(s, 32))


def _pack_scales_and_mins(f: Fields) -> list[Tensor]:
    s, m = _unsigned(f.scales), _unsigned(f.mins)
    first = [each[..., :4] | ((each[..., 4:] >> 4) << 6) for each in (s, m)]
    return [*first, (s[..., 4:] & 15) | ((m[..., 4:] & 15) << 4)]


def _unpack_scales_and_mins(b: Tensor) -> tuple[Tensor, Tensor]:
    s, m, last = b[..., :4], b[..., 4:8], b[..., 8:]
    scales = torch.cat([s & 63, (last & 15) | ((s >> 6) << 4)], dim=-1)
    mins = torch.cat([m & 63, (last >> 4) | ((m >> 6) << 4)], dim=-1)
    return _signed(scales), _signed(mins)


def _pack_q4_k(f: Fields) -> list[Tensor]:
    return [_half(f.d), _half(f.dmin), *_pack_scales_and_mins(f), _interleave(_unsigned(f.codes), 4, 32)]


def _unpack_q4_k(b: Tensor) -> Fields:
    scales, mins = _unpack_scales_and_mins(b[..., 4:16])
    codes = _signed(_deinterleave(b[..., 16:], 4, 32))
    return Fields(codes, _unhalf(b[..., :2]), scales, _unhalf(b[..., 2:4]), mins)


def _pack_q5_k(f: Fields) -> list[Tensor]:
    u = _unsigned(f.codes)
    codes = [_interleave(u >> 4, 1, 32), _interleave(u & 15, 4, 32)]
    return [_half(f.d), _half(f.dmin), *_pack_scales_and_mins(f), *codes]


def _unpack_q5_k(b: Tensor) -> Fields:
    scales, mins = _unpack_scales_and_mins(b[..., 4:16])
    u = _deinterleave(b[..., 48:], 4, 32) | (_deinterleave(b[..., 16:48], 1, 32) << 4)
    return Fields(_signed(u), _unhalf(b[..., :2]), scales, _unhalf(b[..., 2:4]), mins)


def _pack_q6_k(f: Fields) -> list[Tensor]:
    u = _unsigned(f.codes, 32)
    return [_interleave(u & 15, 4, 64), _interleave(u >> 4, 2, 32), _unsigned(f.scales), _half(f.d)]


def _unpack_q6_k(b: Tensor) -> Fields:
    u = _deinterleave(b[..., :128], 4, 64) | (_deinterleave(b[..., 128:192], 2, 32) << 4)
    return Fields(_signed(u, 32), _unhalf(b[..., 208:210]), _signed(b[..., 192:208]))


def _pack_q8_0(f: Fields) -> list[Tensor]:
    return [_half(f.d), _unsigned(f.codes)]


def _unpack_q8_0(b: Tensor) -> Fields:
    return Fields(_signed(b[..., 2:]), _unhalf(b[..., :2]))


def _pack_q4_0(f: Fields) -> list[Tensor]:
    return [_half(f.d), _interleave(_unsigned(f.codes, 8), 4, 16)]


def _unpack_q4_0(b: Tensor) -> Fields:
    return Fields(_signed(_deinterleave(b[..., 2:], 4, 16), 8), _unhalf(b[..., :2]))


def _pack_tq2_0(f: Fields) -> list[Tensor]:
    return [_interleave(_unsigned(f.codes, 1), 2, 32), _half(f.d)]


def _unpack_tq2_0(b: Tensor) -> Fields:
    return Fields(_signed(_deinterleave(b[..., :64], 2, 32), 1), _unhalf(b[..., 64:66]))


_TRIT_STRETCHES = ((0, 5, 32), (160, 5, 16), (240, 4, 4))  # first code, trits a byte, bytes


def _pack_tq1_0(f: Fields) -> list[Tensor]:
    u, parts = _unsigned(f.codes, 1).int(), list[Tensor]()
    for start, trits, width in _TRIT_STRETCHES:
        runs = u[..., start : start + trits * width].unflatten(-1, (trits, width))
        places = torch.tensor([3 ** (4 - k) for k in range(trits)], dtype=torch.int32, device=u.device)
        total = (runs * places[:, None]).sum(-2)
        parts.append(((total * 256 + 242) // 243).to(torch.uint8))
    return [*parts, _half(f.d)]


def _unpack_tq1_0(b: Tensor) -> Fields:
    parts, at = list[Tensor](), 0
    for _, trits, width in _TRIT_STRETCHES:
        places = torch.tensor([3**k for k in range(trits)], dtype=torch.int32, device=b.device)
        fractions = (b[..., None, at : at + width].int() * places[:, None]) & 255  # byte / 256, leading trits dropped
        parts.append(((fractions * 3) >> 8).flatten(-2))
        at += width
    return Fields(torch.cat(parts, dim=-1).to(torch.int8) - 1, _unhalf(b[..., 52:54]))


_PACK: dict[str, Callable[[Fields], list[Tensor]]] = {
    "Q2_K": _pack_q2_k,
    "Q3_K": _pack_q3_k,
    "Q4_K": _pack_q4_k,
    "Q5_K": _pack_q5_k,
    "Q6_K": _pack_q6_k,
    "Q8_0": _pack_q8_0,
    "Q4_0": _pack_q4_0,
    "TQ1_0": _pack_tq1_0,
    "TQ2_0": _pack_tq2_0,
}
_UNPACK: dict[str, Callable[[Tensor], Fields]] = {
    "Q2_K": _unpack_q2_k,
    "Q3_K": _unpack_q3_k,
    "Q4_K": _unpack_q4_k,
    "Q5_K": _unpack_q5_k,
    "Q6_K": _unpack_q6_k,
    "Q8_0": _unpack_q8_0,
    "Q4_0": _unpack_q4_0,
    "TQ1_0": _unpack_tq1_0,
    "TQ2_0": _unpack_tq2_0,
}
