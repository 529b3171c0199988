"""Linear layers that are trained in float and answer in one or two bits a weight.

The latent weight is an ordinary float parameter. Every forward pass quantizes it, and the input, to integer codes and
multiplies the codes; the backward pass treats the quantizers as if they were not there (straight through, scales as
constants, nothing masked):

    forward     y = Q(x) Q(W)^T + b
    backward    dx = dy Q(W)        dW = dy^T Q(x)        db = sum dy

Both directions are one autograd function, for two reasons. The value is *exactly* what the frozen layer computes, since
both call `bitnet.ops.quantized_linear` on the same codes. And what is kept for the backward pass are the codes, one
byte a value, not dequantized floats.

A quantizer whose scale is learned (`bitnet.quant.LSQ`, `bitnet.quant.SEQ`) changes the last gradient alone: dW is then
what `bitnet.quant.learned_gradients` makes of it, and the scale has one, too.

Inputs that are turned by a Hadamard matrix (`bitnet.quant.Rotated`) are turned before that function, with a gradient of
their own, and the latent weight is the turned one. Inputs that stay in float (``activation=None``) are multiplied with
the weight's values.

While its quantization is warmed up (`BitLinear.blend`) a layer is neither dense nor quantized: it computes with values.

    forward     y = (x + b (Q(x) - x)) (W + a (Q(W) - W))^T + bias        a, b from 0 to 1
"""

from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.nn.quantized_linear import QuantizedLinear, float_linear, result_dtype
from bitnet.ops import quantized_linear
from bitnet.quant import (
    LearnedRule,
    LearnedScale,
    QTensor,
    Quantizer,
    Rotated,
    RotatedInputs,
    absmax,
    absmax_b1,
    absmean_ternary,
    centred_sign,
    fake_quantize,
    in_eight_bits,
    learned_gradients,
)
from bitnet.quant.rotation import rotated_block


class BitLinear(nn.Linear):
    """A linear layer with 1-bit weights and int8 activations (BitNet b1), trainable by straight-through estimation.

    Args:
        in_features, out_features: as in `torch.nn.Linear`.
        bias: BitNet's linears have none, so the default is False.
        quantizer: float weight [out, in] -> codes and scale, or the rule of a learned scale (`LSQ`, `SEQ`), which then
            is a parameter of the layer, ``quantizer.scale``. Default: `centred_sign`.
        activation: input [*rows, in] -> codes and scale, None: the inputs stay in float. Default: `absmax_b1`. With
            `Rotated` the latent weight is that of the turned inputs.
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
        quantizer: Quantizer | LearnedRule | None = None,
        activation: Quantizer | Literal["default"] | None = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.quantizer = self._quantizer_for(self.weight, quantizer)
        self.activation = self._activation_for(in_features, activation)
        self.register_buffer("blending", None, persistent=False)  # float32 [2], see `blend`; None: quantized
        self.wider: Quantizer | None = None  # of the inputs, until the last stage of a warm-up; see `blend`

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quantizer: Quantizer | LearnedRule | None = None,
        activation: Quantizer | Literal["default"] | None = "default",
    ) -> Self:
        """The same layer with quantizers: weight and bias are the parameters of ``linear``, shared, not copied.

        A learned scale begins with what its rule makes of that weight. Where ``activation`` turns the inputs
        (`Rotated`) the weight is a parameter of its own, turned as well, so that their product stays what it was.
        """
        weight = linear.weight
        if isinstance(activation, Rotated):
            with torch.no_grad():
                turned = activation.rotate(weight).to(weight.dtype)
            weight = nn.Parameter(turned, requires_grad=weight.requires_grad)
        quantizer = cls._quantizer_for(weight, quantizer)
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            quantizer=quantizer,
            activation=activation,
            device="meta",
        )
        layer.weight, layer.bias = weight, linear.bias
        return layer.train(linear.training)

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if self.blending is not None:
            return self._blended(input)
        quantizer, scale = self.quantizer, None
        if isinstance(quantizer, LearnedScale):
            quantizer, scale = quantizer.rule, quantizer.scale
        x, activation = _turned(input, self.present_activation)
        dtype = result_dtype(input)
        return _BitLinearFunction.apply(x, self.weight, self.bias, scale, quantizer, activation, dtype)

    def blend(self, weight: float, input: float, *, eight_bits: bool = False) -> None:
        """Quantize in part from now on: ``value + share * (quantized - value)``, until both shares are 1.

        At 0 the layer is the dense one; at 1 it is, bit for bit, the layer that never was blended. Gradients pass
        straight through as always. The shares are in no checkpoint: they are a function of the step
        (`bitnet.training.QuantizationWarmup`). A change of them does not compile a compiled layer again, their coming
        and going does.

        Args:
            weight: quantized share of the weights.
            input: of the inputs.
            eight_bits: quantize the inputs to 8 bits for now (`in_eight_bits`), whatever ``activation`` ends in.

        Raises:
            InputError: a share outside 0 ... 1, or inputs that do not end in fewer than 8 bits.
        """
        for name, share in (("weight", weight), ("input", input)):
            if not 0 <= share <= 1:
                raise InputError(f"the quantized share of the {name} must lie between 0 and 1, got {share}")
        self.wider = in_eight_bits(self.activation) if eight_bits else None
        if weight == input == 1:
            self.blending = None
            return
        if self.blending is None:
            self.blending = torch.empty(2, dtype=torch.float32, device=self.weight.device)
        self.blending[0], self.blending[1] = weight, input

    @property
    def warming_up(self) -> bool:
        """Whether the layer computes with anything else than its codes and those of ``activation``; see `blend`."""
        return self.blending is not None or self.wider is not None

    @property
    def present_activation(self) -> Quantizer | None:
        """What quantizes the inputs now: ``activation``, or during a warm-up what comes before it."""
        return self.activation if self.wider is None else self.wider

    def _blended(self, input: Tensor) -> Tensor:
        """The layer during a warm-up, in float32 (under autocast, and for its result, in the layer's usual dtype)."""
        assert self.blending is not None
        x, activation = _turned(input, self.present_activation)
        if isinstance(self.quantizer, LearnedScale):
            hard = _LearnedValues.apply(self.weight, self.quantizer.scale, self.quantizer.rule)
        else:
            hard = fake_quantize(self.weight.float(), self.quantizer)
        weight = torch.lerp(self.weight.float(), hard, self.blending[0])
        values = x.float()
        if activation is not None:
            values = torch.lerp(values, fake_quantize(values, activation), self.blending[1])
        bias = None if self.bias is None else self.bias.float()
        return F.linear(values, weight, bias).to(result_dtype(input))

    @torch.no_grad()
    def quantized_weight(self) -> QTensor:
        """Codes and scale of the weight as it stands."""
        return self.quantizer(self.weight)

    @torch.no_grad()
    def freeze(self) -> QuantizedLinear:
        """The layer without its latent weight: bit for bit the same answers.

        Raises:
            InputError: the weight has a NaN or an infinity, or the warm-up of its quantization has not ended.
        """
        if self.warming_up:
            weight, input = (1, 1) if self.blending is None else self.blending.tolist()
            stage = "" if self.wider is None else ", these in 8 bits"
            raise InputError(
                f"the quantization is still being warmed up (share of the weights {weight:.3g}, of the inputs "
                f"{input:.3g}{stage}), so the codes are not yet what the layer computes with: train to the end of the "
                "warm-up"
            )
        if not torch.isfinite(self.weight).all():
            raise InputError(
                "the weight has values that are not finite, so it has no codes: the training diverged; "
                "go back to the last good checkpoint and lower the learning rate"
            )
        bias: Tensor | None = self.bias
        return QuantizedLinear(self.quantized_weight(), bias if bias is None else bias.clone(), self.activation)

    @classmethod
    def _quantizer_for(cls, weight: Tensor, quantizer: Quantizer | LearnedRule | None) -> Quantizer:
        if quantizer is None:
            return cls.default_quantizer
        return quantizer.for_weight(weight) if isinstance(quantizer, LearnedRule) else quantizer

    @classmethod
    def _activation_for(cls, columns: int, activation: Quantizer | Literal["default"] | None) -> Quantizer | None:
        if isinstance(activation, RotatedInputs):
            raise InputError(
                "which layers' inputs are turned is said by name: give RotatedInputs to bitnet.convert, or Rotated to "
                "this one layer"
            )
        if isinstance(activation, Rotated):
            rotated_block(columns, activation.block)  # refuses the width
        return cls.default_activation if activation == "default" else activation  # pyright: ignore

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
        scale: Tensor | None,
        quantizer: Quantizer | LearnedRule,
        activation: Quantizer | None,
        dtype: torch.dtype,
    ) -> Tensor:
        xq = None if activation is None else activation(x)
        wq = quantizer(weight) if scale is None else quantizer.quantize(weight, scale)  # pyright: ignore
        latent = None if scale is None else weight  # a learned scale's gradient asks where the weight was clipped
        ctx.save_for_backward(*((x, None, None) if xq is None else _tensors(xq)), *_tensors(wq), latent)
        ctx.grids = None if xq is None else (xq.levels, xq.group_size), (wq.levels, wq.group_size)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.rule = None if scale is None else quantizer
        return float_linear(x, wq, bias) if xq is None else quantized_linear(xq, wq, bias, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        needs_x, needs_weight, needs_bias, needs_scale = ctx.needs_input_grad[:4]
        grad, dtype = grad_outputs[0], _gradient_dtype(grad_outputs[0])
        grad = grad.to(dtype)
        wq = _restore(saved[3:6], ctx.grids[1])
        grad_x = grad_weight = grad_bias = grad_scale = None
        if needs_x:
            grad_x = (grad @ wq.dequantize(dtype)).to(x_dtype)
        if needs_weight or needs_scale:
            x = saved[0].to(dtype) if ctx.grids[0] is None else _restore(saved[:3], ctx.grids[0]).dequantize(dtype)
            grad_weight = _rows(grad).t() @ _rows(x)
            if ctx.rule is not None:
                grad_weight, grad_scale = learned_gradients(ctx.rule, saved[6], wq, grad_weight)
            grad_weight = grad_weight.to(weight_dtype)
        if needs_bias and bias_dtype is not None:
            grad_bias = _rows(grad).sum(0, dtype=torch.float32).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, grad_scale, None, None, None


class _LearnedValues(torch.autograd.Function):
    """Values of a weight at a learned scale, with the gradients of `learned_gradients`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, rule: LearnedRule) -> Tensor:
        q = rule.quantize(weight, scale)
        ctx.save_for_backward(weight, *_tensors(q))
        ctx.rule, ctx.grid = rule, (q.levels, q.group_size)
        return q.dequantize()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, *tensors = ctx.saved_tensors
        q = _restore((tensors[0], tensors[1], tensors[2]), ctx.grid)
        grad_weight, grad_scale = learned_gradients(ctx.rule, weight, q, grad_outputs[0])
        return grad_weight.to(weight.dtype), grad_scale, None


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


def _turned(x: Tensor, activation: Quantizer | None) -> tuple[Tensor, Quantizer | None]:
    """The inputs as the weight multiplies them, and what is left to quantize: turning has a gradient of its own."""
    if isinstance(activation, Rotated):
        return activation.rotate(x), activation.quantizer
    return x, activation


def name_of(quantizer: Quantizer | None) -> str:
    """A quantizer as it would be called: ``absmean_ternary(granularity='row')``."""
    function = getattr(quantizer, "func", quantizer)
    options = getattr(quantizer, "keywords", {})
    name = getattr(function, "__name__", repr(function))
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})" if options else name
