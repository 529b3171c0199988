"""Layers: trainable (`BitLinear`, `BitLinear158`), frozen (`QuantizedLinear`), and the way from one to the next."""

from bitnet.nn.bitlinear import BitLinear, BitLinear158
from bitnet.nn.convert import bit_linears, convert, freeze
from bitnet.nn.quantized_linear import QuantizedEmbedding, QuantizedLinear, QuantizedModule

__all__ = [
    "BitLinear",
    "BitLinear158",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedModule",
    "bit_linears",
    "convert",
    "freeze",
]
