"""Layers whose weight is codes and what turns them into values: what evaluation, export and reports see."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.ops import quantized_linear
from bitnet.quant import PackedTensor, QTensor, QuantizedWeight, Quantizer

if TYPE_CHECKING:
    from bitnet.nn.packed_linear import PackedLinear


class QuantizedModule(nn.Module):
    """Holds a quantized weight [rows, columns] as buffers, ``qdata`` and ``weight_<field>``. Not trainable.

    They keep their dtypes: ``model.bfloat16()`` changes none of them.

    Args:
        weight: a `QTensor`, or another dataclass of tensors and plain values.

    Raises:
        InputError: a scale that is not positive and finite, or a weight whose values are not.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        _refuse_damaged(weight)
        self._weight_type, self._plain = type(weight), dict[str, Any]()
        self._tensors: dict[str, str] = {}  # field of the weight -> buffer of this module
        for each in fields(weight):  # pyright: ignore[reportArgumentType]  # a dataclass by contract
            value = getattr(weight, each.name)
            if isinstance(value, Tensor):
                self._tensors[each.name] = each.name if each.name == "qdata" else f"weight_{each.name}"
                self.register_buffer(self._tensors[each.name], value)
            else:
                self._plain[each.name] = value

    @property
    def weight(self) -> QuantizedWeight:
        """The quantized weight."""
        tensors = {field: getattr(self, buffer) for field, buffer in self._tensors.items()}
        return self._weight_type(**tensors, **self._plain)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]  # torch leaves it untyped
        """Move like any module, but keep every dtype of the weight: ``model.bfloat16()`` must not change it."""
        before = {buffer: getattr(self, buffer) for buffer in self._tensors.values()}
        super()._apply(fn, recurse)
        for buffer, tensor in before.items():
            if getattr(self, buffer).dtype != tensor.dtype:
                setattr(self, buffer, tensor.to(getattr(self, buffer).device))
        return self

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{rows}x{columns}, bits_per_weight={self.weight.bits_per_weight:.3f}"


class QuantizedLinear(QuantizedModule):
    """Frozen linear layer: ``activation(x)`` times the quantized weight, plus bias.

    Args:
        weight: quantized weight [out, in], see `QuantizedModule`.
        bias: [out] or None.
        activation: input [*rows, in] -> codes and scale; None leaves the input in float.
    """

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None = None, activation: Quantizer | None = None
    ) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.activation = activation
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if self.activation is None:
            return float_linear(input, self.weight, self.bias)
        return quantized_linear(self.activation(input), self.weight, self.bias, result_dtype(input))

    def pack(self, layout: str | None = None) -> "PackedLinear":
        """The same layer with its ternary or sign codes packed: bit for bit the same answers in fewer bytes.

        Args:
            layout: "i2" or "t5" for ternary codes, "b1" for signs; None: "i2" or "b1".

        Raises:
            InputError: the weight has no such codes, or scales of groups, or a zero point.
        """
        from bitnet.nn.packed_linear import PackedLinear

        weight = self.weight
        if not isinstance(weight, QTensor):
            raise InputError(f"expected ternary or sign codes to pack, got {type(weight).__name__}")
        return PackedLinear(PackedTensor.of(weight, layout), self.bias, self.activation)


class QuantizedEmbedding(QuantizedModule):
    """Frozen embedding: the values of one row of the quantized weight [entries, features] for each id, in ``dtype``."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype

    def forward(self, input: Int64[Tensor, "*ids"]) -> Float[Tensor, "*ids features"]:
        weight = self.weight
        if not isinstance(weight, QTensor) or weight.scale.shape[0] != weight.shape[0]:
            return nn.functional.embedding(input, weight.dequantize(self.dtype))
        zero = None if weight.zero_point is None else weight.zero_point[input]
        rows = QTensor(weight.qdata[input], weight.scale[input], weight.levels, zero, weight.group_size)
        return rows.dequantize(self.dtype)


def float_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """A linear layer whose inputs stay in float: it multiplies with the values of ``weight`` in the dtype of ``x``."""
    bias = None if bias is None else bias.to(x.dtype)
    return nn.functional.linear(x, weight.dequantize(x.dtype), bias)


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer answers in: autocast's where it is on, else that of its input."""
    device = x.device.type
    if device == "meta":  # it has no autocast: asking is an error
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _refuse_damaged(weight: QuantizedWeight) -> None:
    if isinstance(weight, QTensor | PackedTensor):
        if not bool((torch.isfinite(weight.scale) & (weight.scale > 0)).all()):
            raise InputError("every weight scale must be positive and finite: the weight was damaged or not quantized")
    elif not bool(torch.isfinite(weight.dequantize()).all()):
        raise InputError("the quantized weight has values that are not finite: it was damaged or quantized from such")
