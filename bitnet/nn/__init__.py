"""Layers: trainable (`BitLinear`), frozen (`QuantizedLinear`), packed (`PackedLinear`), and the way to the next one."""

from bitnet.nn.bitlinear import BitLinear, BitLinear158
from bitnet.nn.convert import ConversionPlan, bit_linears, convert, freeze, pack, plan_conversion
from bitnet.nn.lora import LatentLoRA, lora_layers, merge_lora
from bitnet.nn.packed_linear import PackedLinear
from bitnet.nn.quantized_linear import QuantizedEmbedding, QuantizedLinear, QuantizedModule

__all__ = [
    "BitLinear",
    "BitLinear158",
    "ConversionPlan",
    "LatentLoRA",
    "PackedLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedModule",
    "bit_linears",
    "convert",
    "freeze",
    "lora_layers",
    "merge_lora",
    "pack",
    "plan_conversion",
]
