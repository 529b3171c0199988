"""What counts as a linear layer, and its weight as [out, in] whichever way it is kept."""

from typing import Any

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


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a linear layer that keeps its weight as [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
