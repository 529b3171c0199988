"""The tensors of a GPTQ checkpoint: words, scales, zero points and group indices of one layer, and back.

::

    qweight  int32 [in * bits / 32, out]        codes, packed down the columns
    qzeros   int32 [groups, out * bits / 32]    zero points, packed along the rows
    scales   float16 [groups, out]
    g_idx    int32 [in]                         the group of each column: i // group_size

    32 codes are a stream of bits, the first code lowest, cut into ``bits`` words of 32: code i has the bits
    i * bits ... i * bits + bits - 1 of the stream. With 3 bits two codes of 32 lie across words (10 and 21).

Codes and zero points are unsigned there, ``value = (code - zero) * scale``; this package's are the same less
2^(bits-1). A symmetric layer has no zero point here and 2^(bits-1) there.

``checkpoint_format: gptq`` (the first one, which every runtime reads) stores zero - 1. A zero point of 0 then becomes
-1, and runtimes disagree about it: those that add 1 to whole words carry into the next field if it was stored as
2^bits - 1, and those that add it field by field read 2^bits. So ``gptq_v2``, which stores the zero points as they are,
is needed as soon as one is 0.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float16, Int32, Integer
from torch import Tensor

from bitnet.errors import InputError
from bitnet.quant import QTensor

BITS = (2, 3, 4, 8)
BLOCK = 32  # codes that fill whole words, whatever the bits
FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class GPTQTensors:
    """One layer as it is stored; see the module."""

    qweight: Int32[Tensor, "words out"]
    qzeros: Int32[Tensor, "groups words_out"]
    scales: Float16[Tensor, "groups out"]
    g_idx: Int32[Tensor, " in"]


def bits_of(weight: QTensor) -> int:
    """The bits that the format takes for these codes: 5 to 7 go into 8."""
    needed = max(2, (weight.levels - 1).bit_length())
    return next(bits for bits in BITS if bits >= needed)


def unsigned_zeros(weight: QTensor, bits: int) -> Integer[Tensor, "groups out"]:
    """Zero points as the format has them, int64, one for every row and group."""
    middle = 2 ** (bits - 1)
    rows, groups = weight.shape[0], weight.scale.shape[1]
    if weight.zero_point is None:
        return torch.full((groups, rows), middle)
    return (weight.zero_point.expand(rows, groups).long() + middle).t().cpu()


def to_tensors(weight: QTensor, bits: int, checkpoint_format: str) -> GPTQTensors:
    """Take a layer apart: columns and rows multiples of 32, scales float16; "gptq" holds no zero point 0."""
    rows, columns = weight.shape
    size = weight.group_size or columns
    zeros = unsigned_zeros(weight, bits) - int(checkpoint_format == "gptq")
    assert int(zeros.min()) >= 0
    scales = weight.scale.expand(rows, weight.scale.shape[1]).t().contiguous().cpu()
    assert scales.dtype == torch.float16
    return GPTQTensors(
        pack_words((weight.qdata.cpu().int() + 2 ** (bits - 1)).t(), bits),
        pack_words(zeros.t(), bits).t().contiguous(),
        scales,
        (torch.arange(columns) // size).int(),
    )


def from_tensors(stored: GPTQTensors, bits: int, group_size: int | None, checkpoint_format: str) -> QTensor:
    """Put a layer together; where every zero point is 2^(bits-1) it has none.

    Raises:
        InputError: a scale that is not positive and finite, a zero point that is no code, or groups out of order.
    """
    if not bool((torch.isfinite(stored.scales) & (stored.scales > 0)).all()):
        raise InputError("every scale must be positive and finite: the file is damaged, or the layer was not quantized")
    columns, middle = len(stored.g_idx), 2 ** (bits - 1)
    if not torch.equal(stored.g_idx, (torch.arange(columns) // (group_size or columns)).int()):
        raise InputError(
            "g_idx assigns columns to groups out of order (act-order without static groups), which this package does "
            "not read: quantize with desc_act=false or static groups"
        )
    zeros = unpack_words(stored.qzeros.t(), bits).t() + int(checkpoint_format == "gptq")
    if int(zeros.max()) >= 2**bits:
        raise InputError(
            f"a zero point of {int(zeros.max())} is none of the codes 0 to {2**bits - 1}: the file is damaged, or its "
            "checkpoint_format is gptq_v2 (zero points as they are) and not gptq (less 1)"
        )
    codes = unpack_words(stored.qweight, bits).t() - middle
    symmetric = bool((zeros == middle).all())
    levels = 2**bits - (1 if symmetric and int(codes.min()) > -middle else 0)
    return QTensor(
        codes.to(torch.int8).contiguous(),
        stored.scales.t().contiguous(),
        levels,
        None if symmetric else (zeros.t() - middle).to(torch.int8).contiguous(),
        group_size,
    )


def pack_words(codes: Integer[Tensor, "n m"], bits: int) -> Int32[Tensor, "words m"]:
    """Pack down the first dimension, whose length must be a multiple of 32: [n * bits / 32, m]."""
    blocks = codes.long().reshape(-1, BLOCK, codes.shape[1])
    words = torch.zeros(len(blocks), bits, codes.shape[1], dtype=torch.int64)
    for index in range(BLOCK):
        word, shift = divmod(index * bits, 32)
        words[:, word] |= blocks[:, index] << shift
        if shift + bits > 32:
            words[:, word + 1] |= blocks[:, index] >> 32 - shift
    words &= 2**32 - 1
    return torch.where(words >= 2**31, words - 2**32, words).int().reshape(-1, codes.shape[1])


def unpack_words(words: Int32[Tensor, "words m"], bits: int) -> Int32[Tensor, "n m"]:
    """The unsigned codes [words * 32 / bits, m]."""
    blocks = words.long().reshape(-1, bits, words.shape[1]) & 2**32 - 1
    codes = torch.empty(len(blocks), BLOCK, words.shape[1], dtype=torch.int32)
    for index in range(BLOCK):
        word, shift = divmod(index * bits, 32)
        code = blocks[:, word] >> shift
        if shift + bits > 32:
            code |= blocks[:, word + 1] << 32 - shift
        codes[:, index] = code & 2**bits - 1
    return codes.reshape(-1, words.shape[1])
