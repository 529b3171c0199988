"""Linear layers that are trained in float and answer in one or two bits a weight.

The latent weight is an ordinary float parameter. Every forward pass quantizes it, and the input, to integer codes and
multiplies the codes; the backward pass treats the quantizers as if they were not there (straight through, scales as
constants, nothing masked):

    forward     y = Q(x) Q(W)^T + b
    backward    dx = dy Q(W)        dW = dy^T Q(x)        db = sum dy

Both directions are one autograd function, for two reasons. The value is *exactly* what the frozen layer computes, since
both call `bitnet.ops.quantized_linear` on the same codes. And what is kept for the backward pass are the codes, one
byte a value, not dequantized floats.
"""

from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.nn.quantized_linear import QuantizedLinear, result_dtype
from bitnet.ops import quantized_linear
from bitnet.quant import QTensor, Quantizer, absmax, absmax_b1, absmean_ternary, centred_sign


class BitLinear(nn.Linear):
    """A linear layer with 1-bit weights and int8 activations (BitNet b1), trainable by straight-through estimation.

    Args:
        in_features, out_features: as in `torch.nn.Linear`.
        bias: BitNet's linears have none, so the default is False.
        quantizer: float weight [out, in] -> codes and scale. Default: `centred_sign`.
        activation: input [*rows, in] -> codes and scale. Default: `absmax_b1`.
        device, dtype: of the latent weight; train it in float32 (in bfloat16 most updates are rounded away).

    Source: BitNet, arXiv:2310.11453, eq. 1-11. Normalize the input before the layer (SubLN).
    """

    default_quantizer: Quantizer = staticmethod(centred_sign)
    default_activation: Quantizer = staticmethod(absmax_b1)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        quantizer: Quantizer | None = None,
        activation: Quantizer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.quantizer = self.default_quantizer if quantizer is None else quantizer
        self.activation = self.default_activation if activation is None else activation

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, quantizer: Quantizer | None = None, activation: Quantizer | None = None
    ) -> Self:
        """The same layer with quantizers: weight and bias are the parameters of ``linear``, shared, not copied."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            quantizer=quantizer,
            activation=activation,
            device="meta",
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        dtype = result_dtype(input)
        return _BitLinearFunction.apply(input, self.weight, self.bias, self.quantizer, self.activation, dtype)

    @torch.no_grad()
    def quantized_weight(self) -> QTensor:
        """Codes and scale of the weight as it stands."""
        return self.quantizer(self.weight)

    @torch.no_grad()
    def freeze(self) -> QuantizedLinear:
        """The layer without its latent weight: bit for bit the same answers.

        Raises:
            InputError: the weight has a NaN or an infinity.
        """
        if not torch.isfinite(self.weight).all():
            raise InputError(
                "the weight has values that are not finite, so it has no codes: the training diverged; "
                "go back to the last good checkpoint and lower the learning rate"
            )
        bias: Tensor | None = self.bias
        return QuantizedLinear(self.quantized_weight(), bias if bias is None else bias.clone(), self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantizer={name_of(self.quantizer)}, activation={name_of(self.activation)}"


class BitLinear158(BitLinear):
    """A linear layer with ternary weights and int8 activations (BitNet b1.58). See `BitLinear` for the arguments.

    Source: BitNet b1.58, arXiv:2402.17764, eq. 1-3.
    """

    default_quantizer = staticmethod(absmean_ternary)
    default_activation = staticmethod(absmax)


class _BitLinearFunction(torch.autograd.Function):
    """Forward and backward of the module's docstring, in float32 except where the arguments are narrower."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        quantizer: Quantizer,
        activation: Quantizer,
        dtype: torch.dtype,
    ) -> Tensor:
        xq, wq = activation(x), quantizer(weight)
        ctx.save_for_backward(*_tensors(xq), *_tensors(wq))
        ctx.grids = (xq.levels, xq.group_size), (wq.levels, wq.group_size)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return quantized_linear(xq, wq, bias, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad, dtype = grad_outputs[0], _gradient_dtype(grad_outputs[0])
        grad = grad.to(dtype)
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = (grad @ _restore(saved[3:], ctx.grids[1]).dequantize(dtype)).to(x_dtype)
        if needs_weight:
            x = _restore(saved[:3], ctx.grids[0]).dequantize(dtype)
            grad_weight = (_rows(grad).t() @ _rows(x)).to(weight_dtype)
        if needs_bias and bias_dtype is not None:
            grad_bias = _rows(grad).sum(0, dtype=torch.float32).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


def _gradient_dtype(grad: Tensor) -> torch.dtype:
    """float32 on a CPU; on CUDA the dtype of the gradient, for the tensor cores."""
    return grad.dtype if grad.is_cuda else torch.float32


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _tensors(q: QTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return q.qdata, q.scale, q.zero_point


def _restore(tensors: tuple[Tensor, Tensor, Tensor | None], grid: tuple[int, int | None]) -> QTensor:
    qdata, scale, zero_point = tensors
    return QTensor(qdata, scale, grid[0], zero_point, grid[1])


def name_of(quantizer: Quantizer) -> str:
    """A quantizer as it would be called: ``absmean_ternary(granularity='row')``."""
    function = getattr(quantizer, "func", quantizer)
    options = getattr(quantizer, "keywords", {})
    name = getattr(function, "__name__", repr(function))
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})" if options else name
