"""Train, quantize and compare 1-bit and 1.58-bit language models.

    import bitnet

    layer = bitnet.BitLinear158(512, 2048)      # trains like nn.Linear, answers with ternary weights and int8 inputs
    frozen = layer.freeze()                     # integer codes and a scale: bit for bit the same answers
    names = bitnet.convert(model)               # every linear of a model but its head

Importing this imports torch and nothing heavier; training, data, export and reports live in their own subpackages.
"""

from bitnet.errors import InputError
from bitnet.nn import BitLinear, BitLinear158, QuantizedLinear, convert, freeze
from bitnet.quant import QTensor, fake_quantize

__version__ = "0.1.0"

__all__ = [
    "BitLinear",
    "BitLinear158",
    "InputError",
    "QTensor",
    "QuantizedLinear",
    "convert",
    "fake_quantize",
    "freeze",
]
