"""The same inputs in 8 bits: what a model is trained with before its inputs go down to 4."""

from dataclasses import replace
from functools import partial
from typing import Any

from bitnet.errors import InputError
from bitnet.quant.absmax import absmax
from bitnet.quant.absmean_int4 import absmean_int4
from bitnet.quant.rotation import Rotated
from bitnet.quant.types import Quantizer
from bitnet.quant.zero_point import zero_point


def in_eight_bits(activation: Quantizer | None) -> Quantizer:
    """The 8-bit quantizer of inputs that stands before ``activation``: turned and grouped alike, `absmax` for 4 bits.

    Raises:
        InputError: ``activation`` has 8 bits itself, or leaves the inputs in float.
    """
    if isinstance(activation, Rotated) and activation.bits < 8:
        return replace(activation, bits=8)
    function: Any = getattr(activation, "func", activation)
    options: dict[str, Any] = dict(getattr(activation, "keywords", {}))
    if function is absmean_int4:
        return partial(absmax, **options) if options else absmax
    if function in (absmax, zero_point) and options.get("bits", 8) < 8:
        return partial(function, **{**options, "bits": 8})
    raise InputError(
        "inputs can go from 8 bits to fewer only where they end in fewer (activation=a4, activation=a4_rotated), got "
        f"{activation or 'none'}: leave out warmup.narrow"
    )
