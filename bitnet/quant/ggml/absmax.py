"""Q4_0, Q8_0, TQ1_0 and TQ2_0 by their definition: the scale of a block is its largest magnitude.

These are the formats' reference quantizers, and their bytes those of ggml and gguf-py for the same values: the only
place here where a half is rounded away from zero (Q4_0: up), and where values are multiplied by the reciprocal of the
unrounded scale. For exact ternary weights TQ1_0 and TQ2_0 lose nothing but the scale's bits below float16.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.quant.ggml.formats import Fields, block_format
from bitnet.quant.ggml.weight import GGMLWeight, in_blocks


def absmax_blocks(weight: Float[Tensor, "out in"], type: str) -> GGMLWeight:
    """Quantize by the reference rule of ``type``. float32.

    Raises:
        InputError: a type without such a rule (the k-quants), or weights whose scale is not finite in float16.
    """
    form = block_format(type)
    if form.scales is not None:
        raise InputError(
            f"{type} has no reference rule, its scales are searched: use KQuant, or Q4_0, Q8_0, TQ1_0, TQ2_0"
        )
    x = in_blocks(weight, form)
    if type == "Q4_0":
        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        d = largest / torch.full_like(largest, -8)
    else:
        largest = x.abs().amax(-1, keepdim=True)
        d = largest / torch.full_like(largest, form.high)
    inverse = torch.where(d == 0, 0.0, 1 / d)
    scaled = x * inverse
    codes = (scaled + 8.5).trunc().clamp(max=15) - 8 if type == "Q4_0" else _half_away_from_zero(scaled)
    stored = d[..., 0].to(torch.float16)
    if not bool(torch.isfinite(stored).all()):
        raise InputError(f"{type} stores scales as float16: a weight is too large for it, or not finite")
    return GGMLWeight.from_fields(Fields(codes.to(torch.int8), stored), type, weight.shape[-1])


def _half_away_from_zero(x: Tensor) -> Tensor:
    whole = x.abs().floor()
    return x.sign() * (whole + (2 * (x.abs() - whole)).floor())
