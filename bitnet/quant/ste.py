"""Straight-through estimation: quantized on the way forward, not there on the way back."""

from typing import Any

import torch
from torch import Tensor

from bitnet.quant.types import Quantizer


class _StraightThrough(torch.autograd.Function):
    """Value of ``hard``, gradient of ``soft``.

    Not ``soft + (hard - soft).detach()``: that sum rounds. Up to 2 % of the weights leave the grid (which ones
    depends on the scale's last bits), a "ternary" weight has seven values, and it no longer equals the packed one.
    """

    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        return hard.view_as(hard)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """``hard``, bit for bit, with the gradient passed on to ``soft`` as it is. Source: arXiv:1308.3432, sec. 4."""
    return _StraightThrough.apply(soft, hard.detach())


def fake_quantize(x: Tensor, quantizer: Quantizer) -> Tensor:
    """The values of ``quantizer(x)`` in the dtype of ``x``, with the gradient of ``x`` (identity, no clipping mask)."""
    return straight_through(x, quantizer(x).dequantize(x.dtype))
