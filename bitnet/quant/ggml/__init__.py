"""Weights in the block formats of GGUF: the bytes, their values, and the search for the best fields."""

from bitnet.quant.ggml.formats import FORMATS, BlockFormat, Fields, block_format
from bitnet.quant.ggml.layouts import pack, unpack
from bitnet.quant.ggml.weight import GGMLWeight

__all__ = ["FORMATS", "BlockFormat", "Fields", "GGMLWeight", "block_format", "pack", "unpack"]
