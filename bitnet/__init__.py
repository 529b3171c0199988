"""Train, quantize and compare 1-bit and 1.58-bit language models.

    import bitnet

    layer = bitnet.BitLinear158(512, 2048)      # trains like nn.Linear, answers with ternary weights and int8 inputs
    frozen = layer.freeze()                     # integer codes and a scale: bit for bit the same answers
    names = bitnet.convert(model)               # every linear of a model but its head
    rows = bitnet.quantize(model, bitnet.ptq.GPTQ(bits=4), token_ids)       # or quantize a trained one as it is
    bitnet.export(model, "gguf", "model.gguf", tokenizer=tokenizer)         # for llama.cpp; also "packed", "hf", "gptq"
    model = bitnet.load("model.gguf").model                                 # back again, from any of these

The names below are loaded when they are first used, so that importing the package is instant (a command line that only
prints its help page needs no torch). Training, data, export and reports live in their own subpackages.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet import export
    from bitnet.errors import InputError
    from bitnet.export.reading import load
    from bitnet.nn import BitLinear, BitLinear158, PackedLinear, QuantizedLinear, convert, freeze, pack
    from bitnet.ptq import quantize
    from bitnet.quant import QTensor, fake_quantize

__version__ = "0.1.0"

__all__ = [
    "BitLinear",
    "BitLinear158",
    "InputError",
    "PackedLinear",
    "QTensor",
    "QuantizedLinear",
    "convert",
    "export",
    "fake_quantize",
    "freeze",
    "load",
    "pack",
    "quantize",
]

_HOMES = {
    "InputError": "bitnet.errors",
    "QTensor": "bitnet.quant",
    "fake_quantize": "bitnet.quant",
    "load": "bitnet.export",
    "quantize": "bitnet.ptq",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bitnet' has no attribute {name!r}: it offers {', '.join(__all__)}")
    if name == "export":
        return import_module("bitnet.export")  # a package that can be called
    return getattr(import_module(_HOMES.get(name, "bitnet.nn")), name)
