"""One token through all layers of a decoder in one call of the compiled kernels: see csrc/decoder.h.

A layer of a small model is some thirty operators a token, each of which costs PyTorch microseconds that have nothing to
do with the numbers. Here the whole step is a list of addresses, made once.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet.ops.native import DOUBLE, FLOAT, INT, LONG, POINTER, TIERS, Linear, Matrix, Native, address, threads_now

ACTIVATIONS = {"relu2": 0, "silu": 1}


class Norm(NamedTuple):
    """Root mean square norm: float32 weight, and what is added to the mean square."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one decoder layer; ``qkv`` and ``gate_up`` are those of several layers in one matrix."""

    norm: Norm
    qkv: Matrix
    o_norm: Norm | None
    o: Matrix
    norm_2: Norm
    gate_up: Matrix
    down_norm: Norm | None
    down: Matrix


@dataclass(frozen=True, slots=True)
class Shape:
    """What a decoder's weights do not tell: heads and their size, how scores are scaled, "relu2" or "silu"."""

    heads: int
    key_heads: int
    size: int
    scaling: float
    activation: str


class _Norm(ctypes.Structure):
    _fields_ = (("weight", POINTER), ("eps", DOUBLE))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, Linear) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _Norm) for name in ("norm", "o_norm", "norm_2", "down_norm")),
        *(("keys", POINTER), ("values", POINTER), ("room", LONG)),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        *((name, LONG) for name in ("count", "hidden", "inner", "heads", "key_heads", "size")),
        ("norm", _Norm),
        *(("head", POINTER), ("head_bias", POINTER), ("vocabulary", LONG)),
        *(("scaling", FLOAT), ("activation", INT)),
    )


class Decoder:
    """The layers of one model, for one token at a time.

    Products of codes are those of ``torch.ops.bitnet.packed_linear``, to the bit; all else is float32, in an order that
    depends neither on the instruction set nor on the number of threads.

    Args:
        native: the compiled kernels.
        tier: the instruction set to use.
        layers: weights on the CPU, contiguous; they are read where they are.
        norm: before the head.
        head: float32 weight [vocabulary, hidden] and bias of the head; None: the head is the caller's.
    """

    def __init__(
        self,
        native: Native,
        tier: str,
        shape: Shape,
        layers: Sequence[Layer],
        norm: Norm,
        head: tuple[Tensor, Tensor | None] | None,
    ) -> None:
        self._native, self._tier, self._shape = native, TIERS.index(tier), shape
        self._kept = layers, norm, head  # what the addresses point to
        self._hidden = layers[0].qkv.columns
        inner = layers[0].down.columns
        weight, bias = head or (None, None)
        self._vocabulary = 0 if weight is None else len(weight)
        self._layers = (_Layer * len(layers))(*map(_layer_of, layers))
        self._decoder = _Decoder(
            *(self._layers, len(layers), self._hidden, inner, shape.heads, shape.key_heads, shape.size),
            *(_norm_of(norm), address(weight), address(bias), self._vocabulary),
            *(shape.scaling, ACTIVATIONS[shape.activation]),
        )
        self._rooms: list[Tensor] = []

    def use(self, rooms: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take these as every layer's memory of keys and values: float32 [1, key heads, room, size], contiguous."""
        self._rooms = [each for pair in rooms for each in pair]
        for layer, (keys, values) in zip(self._layers, rooms, strict=True):
            layer.keys, layer.values, layer.room = keys.data_ptr(), values.data_ptr(), keys.shape[-2]

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, position: int) -> Tensor:
        """Logits [vocabulary], or without a head what it reads, normalized: [hidden].

        Args:
            x: embedding of the token, float32, `hidden` numbers; it is left as it is.
            cos, sin: of the token's place, float32, `size` numbers each, contiguous.
            position: how many tokens the memory holds; their keys and values are read, and the token's appended.
        """
        assert position < self._layers[0].room
        assert cos.numel() == sin.numel() == self._shape.size
        assert x.numel() == self._hidden
        x = x.clone()
        y = torch.empty(self._vocabulary or self._hidden)
        failed = self._native.decode(
            *(ctypes.byref(self._decoder), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), position),
            *(y.data_ptr(), threads_now(), self._tier),
        )
        if failed:
            raise MemoryError(f"no memory for a step after {position} tokens")
        return y


def _layer_of(layer: Layer) -> _Layer:
    return _Layer(
        *map(Linear.of, (layer.qkv, layer.o, layer.gate_up, layer.down)),
        *map(_norm_of, (layer.norm, layer.o_norm, layer.norm_2, layer.down_norm)),
    )


def _norm_of(norm: Norm | None) -> _Norm:
    return _Norm(None, 0.0) if norm is None else _Norm(norm.weight.data_ptr(), norm.eps)
