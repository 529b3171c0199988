"""The quantizer of a model's inputs as a line of json in the file's metadata, and back.

llama.cpp quantizes inputs in its own blocks whatever stands here: this line is what makes the model read back by this
package answer as it did.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from bitnet.errors import InputError
from bitnet.export.codec import restore_activation, store_activation
from bitnet.export.parity import quantized_layers
from bitnet.nn import BitLinear, PackedLinear, QuantizedLinear
from bitnet.quant import Quantizer, Rotated

KEY = "bitnet_qat.activation"


def activation_entry(model: nn.Module) -> Mapping[str, Any] | None:
    """What quantizes the inputs of all quantized layers of ``model``; None where nothing does.

    Raises:
        InputError: they differ from layer to layer (a static range, say), or no file can name them.
    """
    entries: list[Mapping[str, Any] | None] = []
    for name, layer in quantized_layers(model).items():
        if not isinstance(layer, BitLinear | QuantizedLinear | PackedLinear):
            continue
        if isinstance(layer.activation, Rotated):
            raise InputError(
                f"the inputs of {name} are turned by a Hadamard matrix, which no runtime of GGUF files does: use "
                "export=packed, or train with activation=a4"
            )
        stored = store_activation(layer.activation)
        if stored is not None and stored.tensors:
            raise InputError(
                f"the inputs of {name} have a static range, which has no place: quantize with activation=none"
            )
        entry = None if stored is None else stored.entry
        if entry not in entries:
            entries.append(entry)
    if len(entries) > 1:
        raise InputError("the layers quantize their inputs in different ways, and a GGUF file has place for one")
    return entries[0] if entries else None


def read_activation(text: str) -> Quantizer | None:
    """The quantizer that `activation_entry` described.

    Raises:
        InputError: it describes none of this package's.
    """
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise InputError(f"{KEY} is no json ({text[:60]!r}): the file is damaged") from error
    if entry is not None and not isinstance(entry, dict):
        raise InputError(f"{KEY} must be a json object, got {text[:60]!r}")
    return restore_activation(entry, {})
