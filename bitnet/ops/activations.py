"""Quantizers of inputs that the operator fuses with the product, by the names that it takes."""

from bitnet.quant.absmax import absmax, absmax_b1

ACTIVATIONS = {"absmax": absmax, "absmax_b1": absmax_b1}
