"""How many bits a model takes, counted and not claimed.

A quantized linear counts its codes in their densest packing, its scales and its zero points; everything else counts at
the width of its dtype. Embeddings, norms and head are in the total: they are most of a small model, and "1.58 bits"
says nothing of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.nn import BitLinear, QuantizedLinear, QuantizedModule
from bitnet.nn.linears import is_linear, weight_of


@dataclass(frozen=True, slots=True)
class LayerFootprint:
    """The weight of one linear layer: ``kind`` is dense, latent (trained by QAT, not frozen yet) or quantized."""

    name: str
    kind: str
    shape: tuple[int, int]  # out, in
    bits: int

    @property
    def n_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        return self.bits / self.n_weights


@dataclass(frozen=True, slots=True)
class Footprint:
    """The bits of a model's linears, and of the model as a whole with each shared tensor counted once."""

    layers: tuple[LayerFootprint, ...]
    total_bits: int
    n_parameters: int

    @property
    def bytes(self) -> int:
        """Of the whole model: linears, biases, embeddings, norms, head."""
        return -(-self.total_bits // 8)

    @property
    def model_bits_per_weight(self) -> float:
        """Bits per parameter of the whole model."""
        return self.total_bits / self.n_parameters

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the linears that a method quantizes or trains to be; of all linears in a dense model."""
        chosen = [layer for layer in self.layers if layer.kind != "dense"] or self.layers
        return sum(layer.bits for layer in chosen) / sum(layer.n_weights for layer in chosen)

    @property
    def quantized_share(self) -> float:
        """Weights that are quantized, as a share of all parameters."""
        chosen = sum(layer.n_weights for layer in self.layers if layer.kind == "quantized")
        return chosen / self.n_parameters

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Cells of a table: name, kind, shape, bits per weight, bytes. A line each linear, the rest, the whole."""
        rest_bits = self.total_bits - sum(layer.bits for layer in self.layers)
        rest = self.n_parameters - sum(layer.n_weights for layer in self.layers)
        rows = [
            _row(layer.name, layer.kind, f"{layer.shape[0]}x{layer.shape[1]}", layer.n_weights, layer.bits)
            for layer in self.layers
        ]
        rows.append(_row("everything else", "", str(rest), rest, rest_bits))
        rows.append(_row("whole model", "", str(self.n_parameters), self.n_parameters, self.total_bits))
        return rows


def footprint(model: nn.Module, *, stored_dtype: torch.dtype | None = None) -> Footprint:
    """Return what ``model`` would take in a file, in bits; it may be on the meta device.

    ``stored_dtype`` is the floating dtype that the weights have in their checkpoint, where loading widened them; None
    counts them as they are.

    A linear whose weight an earlier module holds already (a tied head) is no layer of its own. Buffers that are not
    saved (rotary tables) are not counted.

    Raises:
        InputError: The model has no linear layer.
    """
    seen: set[int] = set()
    layers: list[LayerFootprint] = []
    total_bits = n_parameters = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            weight = module.weight
            shape = (weight.shape[0], weight.shape[1])
            bits = round(weight.bits_per_weight * shape[0] * shape[1])
            if isinstance(module, QuantizedLinear):
                layers.append(LayerFootprint(name, "quantized", shape, bits))
            total_bits += bits
            n_parameters += shape[0] * shape[1]
            bias = getattr(module, "bias", None)
            tensors = [] if bias is None else [bias]
        else:
            tensors = list(_saved_tensors(module))
        new = [tensor for tensor in tensors if id(tensor) not in seen]
        seen.update(id(tensor) for tensor in new)
        total_bits += sum(_bits(tensor, stored_dtype) for tensor in new)
        n_parameters += sum(tensor.numel() for tensor in new)
        if isinstance(module, BitLinear) or is_linear(module):
            weight = cast(Tensor, module.weight)
            if any(tensor is weight for tensor in new):
                kind = "latent" if isinstance(module, BitLinear) else "dense"
                out, columns = weight_of(module).shape
                layers.append(LayerFootprint(name, kind, (out, columns), _bits(weight, stored_dtype)))
    if not layers:
        raise InputError("expected a model with linear layers, found none: there is nothing to count bits of")
    return Footprint(tuple(layers), total_bits, n_parameters)


def _saved_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and the saved buffers of this very module, not of its parts."""
    yield from module.parameters(recurse=False)
    saved = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
    yield from (buffer for name in saved if (buffer := module._buffers[name]) is not None)


def _bits(tensor: Tensor, stored_dtype: torch.dtype | None) -> int:
    size = tensor.element_size()
    if stored_dtype is not None and tensor.is_floating_point():
        size = min(size, stored_dtype.itemsize)
    return tensor.numel() * size * 8


def _row(name: str, kind: str, shape: str, count: int, bits: int) -> tuple[str, str, str, str, str]:
    return name, kind, shape, f"{bits / count:.4f}" if count else "", f"{-(-bits // 8):,}"
