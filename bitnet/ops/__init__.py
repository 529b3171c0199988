"""Operators on codes. `reference` says what each must compute."""

from bitnet.ops.reference import quantized_linear

__all__ = ["quantized_linear"]
