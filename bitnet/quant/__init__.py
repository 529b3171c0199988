"""Quantizers: pure functions from a float tensor to integer codes and a scale, and the packing of the codes."""

from bitnet.quant.absmax import absmax, absmax_b1
from bitnet.quant.absmean import absmean_ternary
from bitnet.quant.absmean_int4 import absmean_int4
from bitnet.quant.grid import Grid
from bitnet.quant.grouping import Granularity
from bitnet.quant.histogram import Histogram
from bitnet.quant.learned import LSQ, SEQ, LearnedRule, LearnedScale, learned_gradients
from bitnet.quant.packed import PackedTensor
from bitnet.quant.packing import pack, packed_bits, unpack
from bitnet.quant.rotation import Rotated, RotatedInputs, rotate
from bitnet.quant.sign import centred_sign
from bitnet.quant.static import FixedRange, StaticActivation
from bitnet.quant.ste import fake_quantize, straight_through
from bitnet.quant.types import QTensor, QuantizedWeight, Quantizer
from bitnet.quant.wider import in_eight_bits
from bitnet.quant.zero_point import zero_point

__all__ = [
    "LSQ",
    "SEQ",
    "FixedRange",
    "Granularity",
    "Grid",
    "Histogram",
    "LearnedRule",
    "LearnedScale",
    "PackedTensor",
    "QTensor",
    "QuantizedWeight",
    "Quantizer",
    "Rotated",
    "RotatedInputs",
    "StaticActivation",
    "absmax",
    "absmax_b1",
    "absmean_int4",
    "absmean_ternary",
    "centred_sign",
    "fake_quantize",
    "in_eight_bits",
    "learned_gradients",
    "pack",
    "packed_bits",
    "rotate",
    "straight_through",
    "unpack",
    "zero_point",
]
