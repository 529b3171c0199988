"""What counts as a linear layer, and its weight as [out, in] whichever way it is kept."""

from typing import Any

import torch
from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix of its own as ``nn.Linear`` or transformers' ``Conv1D`` (GPT-2) do.

    A subclass of ``nn.Linear`` with a forward pass of its own may do anything: it is none.
    """
    return (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward) or is_conv1d(module)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear as [out, in]; Conv1D keeps it as [in, out]."""
    weight: Any = layer.weight
    return weight.detach().t() if is_conv1d(layer) else weight.detach()


def as_linear(layer: nn.Module) -> nn.Linear:
    """``layer`` itself where it is an ``nn.Linear``; a ``Conv1D`` as one, its bias shared and its weight transposed."""
    if isinstance(layer, nn.Linear):
        return layer
    assert is_conv1d(layer)
    weight: Any = layer.weight
    bias: Any = layer.bias
    columns, rows = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    with torch.no_grad():
        linear.weight = nn.Parameter(weight.t().contiguous(), requires_grad=weight.requires_grad)
    linear.bias = bias
    return linear.train(layer.training)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a linear layer that keeps its weight as [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
