"""Weights in the block formats of GGUF: the bytes, their values, and the search for the best fields."""

from bitnet.quant.ggml.absmax import absmax_blocks
from bitnet.quant.ggml.formats import FORMATS, BlockFormat, Fields, block_format, round_to_codes
from bitnet.quant.ggml.layouts import pack, unpack
from bitnet.quant.ggml.search import fit_fields, magnitude_weighted, with_nearest_codes
from bitnet.quant.ggml.weight import GGMLWeight, in_blocks

__all__ = [
    "FORMATS",
    "BlockFormat",
    "Fields",
    "GGMLWeight",
    "absmax_blocks",
    "block_format",
    "fit_fields",
    "in_blocks",
    "magnitude_weighted",
    "pack",
    "round_to_codes",
    "unpack",
    "with_nearest_codes",
]
