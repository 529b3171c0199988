"""Operators on codes. `reference` says what each must compute."""

from bitnet.ops import cuda
from bitnet.ops.cpu import choice
from bitnet.ops.packed_linear import packed_linear
from bitnet.ops.reference import quantized_linear

__all__ = ["choice", "cuda", "packed_linear", "quantized_linear"]
