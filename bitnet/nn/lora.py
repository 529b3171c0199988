"""Latent LoRA: train few numbers, and have one quantized matrix in the end.

The latent weight of a layer is a frozen base plus a product of two thin matrices,

    W = base + alpha / rank * B A          A [rank, in], B [out, rank], B = 0 at the start

and what the layer quantizes, in every step, is W. An adapter beside a quantized layer would stay a second, dense
product for good; here it is gone once it is merged (`merge_lora`), and a plain `BitLinear` is left: trained, frozen and
packed layer agree bit for bit, because one operator computes the merged weight everywhere.

Source: LoRA, arXiv:2106.09685, eq. 3 and sec. 4.1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bitnet.errors import InputError
from bitnet.nn.bitlinear import BitLinear
from bitnet.nn.convert import bit_linears, matching
from bitnet.quant import LearnedScale


@dataclass(frozen=True, slots=True)
class LatentLoRA:
    """Freeze a converted model and give its layers adapters: ``LatentLoRA(rank=16)(model)``, in place.

    Args:
        rank: of the product; at most the smaller side of every layer that gets one.
        alpha: the product is multiplied by ``alpha / rank``.
        include: patterns of the layers that get an adapter, as in `bitnet.convert`; the weights of others stay frozen.
        norms: train vectors on: the gains of norms, and biases.
        scales: train the scales on that quantizers learn (`bitnet.quant.LSQ`).
        embeddings, head: train these matrices on, in full. Tied, they are one, and either trains it.
        seed: of the random A.

    Raises:
        InputError: values that are out of range.
    """

    rank: int = 16
    alpha: float = 32.0
    include: Sequence[str] = ("*",)
    norms: bool = True
    scales: bool = True
    embeddings: bool = False
    head: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise InputError(f"lora.rank must be a positive whole number, got {self.rank!r}")
        if type(self.seed) is not int:
            raise InputError(f"lora.seed must be a whole number, got {self.seed!r}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise InputError(f"lora.alpha must be a positive number, got {self.alpha!r}")

    def __call__(self, model: nn.Module) -> list[str]:
        """Names of the layers that have an adapter now. All other parameters are frozen but those named above.

        Raises:
            InputError: no `BitLinear`, adapters in place, a pattern without a match, a layer smaller than ``rank``;
                nothing is changed then.
        """
        layers = dict(bit_linears(model))
        if not layers:
            raise InputError(
                "lora= goes with layers that are quantized in training: convert the model (model=bitnet158)"
            )
        if lora_layers(model):
            raise InputError("the model has adapters already: merge them first (bitnet.nn.merge_lora)")
        chosen = matching(layers, self.include, "lora.include")
        if not chosen:
            raise InputError("lora.include must name a layer or more, such as [q_proj, v_proj], got []")
        for name in layers:
            sides = layers[name].out_features, layers[name].in_features
            if name in chosen and self.rank > min(sides):
                raise InputError(
                    f"lora.rank must be at most the smaller side of each layer, got {self.rank} and {name} with "
                    f"{list(sides)}: lower it, or leave the layer out with lora.include"
                )
        self._freeze(model)
        generator = torch.Generator().manual_seed(self.seed)
        names = [name for name in layers if name in chosen]
        for name in names:
            adapter = _LowRank(layers[name].weight, self.rank, self.alpha, generator)
            parametrize.register_parametrization(layers[name], "weight", adapter)
        return names

    def _freeze(self, model: nn.Module) -> None:
        scales = {id(module.scale) for module in model.modules() if isinstance(module, LearnedScale)}
        matrices = {"get_input_embeddings": self.embeddings, "get_output_embeddings": self.head}
        places: list[Any] = [getattr(model, name, lambda: None)() for name, wanted in matrices.items() if wanted]
        kept = {id(place.weight) for place in places if place is not None}
        for parameter in model.parameters():
            if id(parameter) in scales:
                trained = self.scales
            else:
                trained = id(parameter) in kept or (self.norms and parameter.dim() == 1)
            parameter.requires_grad_(trained)


def lora_layers(model: nn.Module) -> list[tuple[str, BitLinear]]:
    """Names and layers of every `BitLinear` of ``model`` that has an adapter, in order."""
    return [(name, layer) for name, layer in bit_linears(model) if adapter_of(layer) is not None]


def base_name(name: str) -> str:
    """The name that a parameter had before its layer got an adapter: that of its base in the model without adapters."""
    return name.replace(".parametrizations.weight.original", ".weight")


def adapter_of(layer: nn.Module) -> "_LowRank | None":
    """The adapter of a layer's weight: its parameters are ``a`` [rank, in] and ``b`` [out, rank]."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first: Any = layer.parametrizations["weight"][0]  # pyright: ignore
    return first if isinstance(first, _LowRank) else None


def merge_lora(model: nn.Module) -> list[str]:
    """Replace, in place, each adapter by the latent weight it amounts to; return the names of the layers, in order.

    What was frozen stays frozen.

    Raises:
        InputError: there is none.
    """
    layers = lora_layers(model)
    if not layers:
        raise InputError("the model has no adapters to merge")
    for _, layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return [name for name, _ in layers]


class _LowRank(nn.Module):
    """``base -> base + alpha / rank * B A``; at the start ``base``, to the bit."""

    def __init__(self, base: Float[Tensor, "out in"], rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = base.shape
        reach = 1 / math.sqrt(columns)
        a = (2 * torch.rand(rank, columns, generator=generator) - 1) * reach
        self.a = nn.Parameter(a.to(base.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=base.device))
        self.factor = alpha / rank

    def forward(self, base: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return torch.ops.bitnet.add_low_rank(base, self.b, self.a, self.factor)


@torch.library.custom_op("bitnet::add_low_rank", mutates_args=())
def _add_low_rank(base: Tensor, b: Tensor, a: Tensor, factor: float) -> Tensor:
    """``base + factor * b @ a`` in float32. Opaque to compilers, which would add in another order than `merge_lora`."""
    with torch.autocast(base.device.type, enabled=False):
        return torch.addmm(base.float(), b, a, alpha=factor).to(base.dtype)


@_add_low_rank.register_fake
def _(base: Tensor, b: Tensor, a: Tensor, factor: float) -> Tensor:
    return base.new_empty(base.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, b, a, ctx.factor = inputs
    ctx.save_for_backward(b, a)


def _gradients(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
    b, a = ctx.saved_tensors
    with torch.autocast(grad.device.type, enabled=False):
        grad = grad.float()
        return None, ctx.factor * (grad @ a.t()), ctx.factor * (b.t() @ grad), None


_add_low_rank.register_autograd(_gradients, setup_context=_keep)
