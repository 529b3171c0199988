"""A frozen layer in as few bytes as its codes need: what inference runs on."""

import inspect
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from bitnet.nn.quantized_linear import QuantizedModule, float_linear, result_dtype
from bitnet.ops import packed_linear, quantized_linear
from bitnet.ops.packed_linear import ACTIVATIONS
from bitnet.quant import Quantizer, Rotated
from bitnet.quant.packed import PackedTensor


class PackedLinear(QuantizedModule):
    """Frozen linear layer on packed codes: bit for bit the answers of the `QuantizedLinear` that it was packed from.

    It runs on ``torch.ops.bitnet.packed_linear`` where that knows the quantizer of the inputs (``absmax`` and
    ``absmax_b1`` with their own defaults, and `Rotated` ones of 8 bits, which are turned before); with another
    quantizer, or none, it unpacks its codes in every forward pass.

    Args:
        weight: packed codes [out, in] and scale.
        bias: [out] or None.
        activation: input [*rows, in] -> codes and scale; None leaves the input in float.
    """

    def __init__(self, weight: PackedTensor, bias: Tensor | None = None, activation: Quantizer | None = None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.activation = activation
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._known = known_activation(activation)
        self._known_turned = known_activation(activation.quantizer) if isinstance(activation, Rotated) else None

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:  # type: ignore[no-untyped-def]  # as in torch
        """Rows of a larger matrix (`bitnet.nn.fuse`) are copied: a file would hold all of it for each layer."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for buffer in self._tensors.values():
            tensor = destination[prefix + buffer]
            if tensor.untyped_storage().nbytes() > tensor.nbytes:
                destination[prefix + buffer] = tensor.clone()

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        weight = self.weight
        assert isinstance(weight, PackedTensor)
        if self._known is not None:
            y = packed_linear(input, weight.packed, weight.scale, self.bias, weight.layout, self._known)
            return y.to(result_dtype(input))
        if self._known_turned is not None and isinstance(self.activation, Rotated):
            x = self.activation.rotate(input)
            y = packed_linear(x, weight.packed, weight.scale, self.bias, weight.layout, self._known_turned)
            return y.to(result_dtype(input))
        if self.activation is None:
            return float_linear(input, weight, self.bias)
        return quantized_linear(self.activation(input), weight.unpack(), self.bias, result_dtype(input))


def known_activation(activation: Quantizer | None) -> str | None:
    """The name by which the operator knows this quantizer of inputs, None where it does not."""
    options = {}
    if isinstance(activation, partial) and not activation.args:
        activation, options = activation.func, activation.keywords
    name = next((name for name, quantizer in ACTIVATIONS.items() if quantizer is activation), None)
    if name is None:
        return None
    defaults = {key: each.default for key, each in inspect.signature(ACTIVATIONS[name]).parameters.items()}
    return name if all(defaults[key] == value for key, value in options.items()) else None
