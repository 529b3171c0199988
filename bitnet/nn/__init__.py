"""Layers: trainable (`BitLinear`), frozen (`QuantizedLinear`), packed (`PackedLinear`), and the way to the next one."""

from bitnet.nn.bitlinear import BitLinear, BitLinear158
from bitnet.nn.convert import bit_linears, convert, freeze, pack
from bitnet.nn.packed_linear import PackedLinear
from bitnet.nn.quantized_linear import QuantizedEmbedding, QuantizedLinear, QuantizedModule

__all__ = [
    "BitLinear",
    "BitLinear158",
    "PackedLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedModule",
    "bit_linears",
    "convert",
    "freeze",
    "pack",
]
