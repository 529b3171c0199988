"""The block formats of GGUF files that hold weights here: what a block stores, and in which ranges.

A row is cut into blocks of 256 (Q4_0 and Q8_0: 32) consecutive weights. A k-quant's block ("super-block") is divided
again into sub-blocks of 16 or 32 with an integer scale each, and, where the grid is affine, an integer minimum::

    affine       Q2_K Q4_K Q5_K       value = (d * scale) * code - (dmin * min)
    symmetric    Q3_K Q6_K            value = (d * scale) * code
    plain        Q4_0 Q8_0 TQ1_0 TQ2_0   value = d * code

d and dmin are float16, products are float32 in the order of the brackets. Codes are kept signed where the format's own
offset is a constant (Q3_K: 4, Q6_K: 32, Q4_0: 8, TQ1_0 and TQ2_0: 1). Layouts: `bitnet.quant.ggml.layouts`.
Source: the GGUF quantization types of the ggml library; gguf-py's dequantizers are the oracle of the tests.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Int8
from torch import Tensor

from bitnet.errors import InputError


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """What a block of one GGUF type consists of.

    Attributes:
        name: as in GGUF, for example "Q4_K".
        block: weights a block.
        nbytes: bytes a block.
        sub: weights a sub-block (that share an integer scale); ``block`` where there is none.
        low: the smallest code.
        high: the largest code.
        scales: smallest and largest integer scale; None where only d scales.
        mins: the largest integer minimum (the smallest is 0); None where the grid has no minimum.
    """

    name: str
    block: int
    nbytes: int
    sub: int
    low: int
    high: int
    scales: tuple[int, int] | None = None
    mins: int | None = None

    @property
    def bits(self) -> float:
        """Stored bits a weight, where blocks are full."""
        return self.nbytes * 8 / self.block


FORMATS = {
    each.name: each
    for each in (
        BlockFormat("Q2_K", 256, 84, sub=16, low=0, high=3, scales=(0, 15), mins=15),
        BlockFormat("Q3_K", 256, 110, sub=16, low=-4, high=3, scales=(-32, 31)),
        BlockFormat("Q4_K", 256, 144, sub=32, low=0, high=15, scales=(0, 63), mins=63),
        BlockFormat("Q5_K", 256, 176, sub=32, low=0, high=31, scales=(0, 63), mins=63),
        BlockFormat("Q6_K", 256, 210, sub=16, low=-32, high=31, scales=(-128, 127)),
        BlockFormat("Q8_0", 32, 34, sub=32, low=-127, high=127),
        BlockFormat("Q4_0", 32, 18, sub=32, low=-8, high=7),
        BlockFormat("TQ1_0", 256, 54, sub=256, low=-1, high=1),
        BlockFormat("TQ2_0", 256, 66, sub=256, low=-1, high=1),
    )
}


def block_format(name: str) -> BlockFormat:
    """The format of that name.

    Raises:
        InputError: there is none.
    """
    if name not in FORMATS:
        raise InputError(f"type must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


@dataclass(frozen=True, slots=True)
class Fields:
    """What the bytes of a matrix say, in numbers: one entry a block in the second dimension.

    Attributes:
        codes: [rows, blocks, weights of a block], in the order of the columns.
        d: the scale of a block.
        scales: integer scale of every sub-block; None where the format has none.
        dmin: the scale of the minima; None where the format has none.
        mins: integer minimum of every sub-block; None where the format has none.
    """

    codes: Int8[Tensor, "rows blocks block"]
    d: Float16[Tensor, "rows blocks"]
    scales: Int8[Tensor, "rows blocks subs"] | None = None
    dmin: Float16[Tensor, "rows blocks"] | None = None
    mins: Int8[Tensor, "rows blocks subs"] | None = None

    def steps(self) -> Float[Tensor, "rows blocks subs"]:
        """Distance of neighbouring values in each sub-block: ``d * scale``, float32."""
        d = self.d.float()[..., None]
        return d if self.scales is None else d * self.scales.float()

    def offsets(self) -> Float[Tensor, "rows blocks subs"] | None:
        """What is subtracted from ``step * code`` in each sub-block: ``dmin * min``, float32."""
        return None if self.dmin is None or self.mins is None else self.dmin.float()[..., None] * self.mins.float()

    def values(self) -> Float[Tensor, "rows blocks block"]:
        """``step * code - offset``, float32, each product rounded by itself."""
        steps, offsets = self.steps(), self.offsets()
        values = self.codes.unflatten(-1, (steps.shape[-1], -1)).float()
        values *= steps[..., None]
        if offsets is not None:
            values -= offsets[..., None]
        return values.flatten(-2)


def round_to_codes(
    blocks: Float[Tensor, "rows blocks block"],
    form: BlockFormat,
    steps: Float[Tensor, "rows blocks subs"],
    offsets: Float[Tensor, "rows blocks subs"] | None,
) -> Int8[Tensor, "rows blocks block"]:
    """Nearest codes to ``blocks``: ``(x + offset) / step`` half to even in float32; code 0 where the step is 0."""
    x = blocks.float().unflatten(-1, (steps.shape[-1], -1))
    if offsets is not None:
        x = x + offsets[..., None]
    codes = torch.where(steps[..., None] == 0, 0.0, x / steps[..., None]).round_().clamp_(form.low, form.high)
    return codes.to(torch.int8).flatten(-2)
