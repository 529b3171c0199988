"""Inputs that are turned by a Hadamard matrix before they are quantized, so that outliers are shared out.

A few inputs of a projection are much larger than the rest, and 4 bits clip them or lose the rest. H / sqrt(n) is
orthogonal and its entries are all as large: each turned input is a sum of all n, with signs, and nearly normal. The
weight is turned as well, once, when a layer is converted, and the product stays what it was:

    y = W x = (W H / sqrt(n)) (H x / sqrt(n))           H is symmetric, and H H = n

So the latent weight of such a layer is the turned one: what multiplies the turned input. H is Sylvester's, of the
largest power of two that divides the width; a wider row is turned block by block.

Turned values are sums and differences of pairs in float32, log2(n) times over, in one operator that is opaque to
compilers. Every value is computed alike whatever stands beside it, so batches, threads and compilers change no bit.

Source: BitNet v2, arXiv:2504.18415, sec. 2.2 (H-BitLinear).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError
from bitnet.quant.absmax import absmax
from bitnet.quant.absmean_int4 import absmean_int4
from bitnet.quant.grouping import Granularity, group_size_of
from bitnet.quant.types import QTensor, Quantizer


def rotate(x: Float[Tensor, "*rows cols"], block: int | None = None) -> Float[Tensor, "*rows cols"]:
    """``x H / sqrt(block)`` for each block of columns, in float32; its own inverse, and differentiable.

    Args:
        x: floating, [*rows, cols].
        block: a power of two that divides cols; None: the largest one.

    Raises:
        InputError: no such block, or an input that is not floating.
    """
    if not x.is_floating_point() or x.dim() == 0:
        raise InputError(f"only rows of floating numbers can be turned, got {x.dtype} {list(x.shape)}")
    return torch.ops.bitnet.hadamard(x.float(), rotated_block(x.shape[-1], block))


def rotated_block(columns: int, block: int | None = None) -> int:
    """The columns that are turned together.

    Raises:
        InputError: ``columns`` is odd, or ``block`` is no power of two from 2 on that divides it.
    """
    largest = columns & -columns  # the lowest bit that is set
    if largest < 2:
        raise InputError(
            f"inputs that are turned by a Hadamard matrix need an even width, got {columns}: leave the layer out of "
            "activation.rotate"
        )
    if block is None:
        return largest
    if isinstance(block, bool) or not isinstance(block, int) or block < 2 or block & (block - 1) or largest % block:
        raise InputError(
            f"activation.block must be a power of two from 2 on that divides the inputs' width {columns}, got "
            f"{block!r}: leave it at null for the largest one, {largest}"
        )
    return block


@torch.library.custom_op("bitnet::hadamard", mutates_args=())
def _hadamard(x: Tensor, block: int) -> Tensor:
    """Each step adds and subtracts neighbours and puts sums before differences: after log2(block) steps this is H."""
    y = x.reshape(-1, block)
    half = block // 2
    for _ in range(half.bit_length()):
        even, odd, following = y[:, 0::2], y[:, 1::2], torch.empty_like(y)
        torch.add(even, odd, out=following[:, :half])
        torch.sub(even, odd, out=following[:, half:])
        y = following
    return y.mul_(1 / math.sqrt(block)).reshape(x.shape)


@_hadamard.register_fake
def _(x: Tensor, block: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_block(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.block = inputs[1]


def _turn_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.bitnet.hadamard(grad, ctx.block), None


_hadamard.register_autograd(_turn_back, setup_context=_keep_block)


@dataclass(frozen=True, slots=True)
class Rotated:
    """Quantizer of inputs that are turned first (`rotate`). The weight beside it must be turned, too.

    Args:
        bits: 4 rounds as `absmean_int4` does; 2, 3, 5 to 8 as `absmax`.
        granularity: what shares a scale; a "row" is a token.
        block: columns that are turned together; None: the largest power of two that divides the width.

    Raises:
        InputError: options that do not fit.
    """

    bits: int = 4
    granularity: Granularity = "row"
    block: int | None = None

    def __post_init__(self) -> None:
        group_size_of(self.granularity)
        self.quantizer(torch.zeros(1, 1))  # refuses bits
        if self.block is not None:
            rotated_block(self.block, self.block)

    @property
    def quantizer(self) -> Quantizer:
        """What rounds the turned inputs."""
        if self.bits == 4:
            return partial(absmean_int4, granularity=self.granularity)
        return partial(absmax, bits=self.bits, granularity=self.granularity)

    def rotate(self, x: Float[Tensor, "*rows cols"]) -> Float[Tensor, "*rows cols"]:
        """Inputs, or a weight [out, in], turned: float32."""
        return rotate(x, self.block)

    def __call__(self, x: Float[Tensor, "*rows cols"]) -> QTensor:
        return self.quantizer(self.rotate(x.detach()))


@dataclass(frozen=True, slots=True)
class RotatedInputs:
    """Quantizers of inputs, turned first in some layers only: what `bitnet.convert` gives to each by its name.

    Args:
        rotate: patterns of the layers whose inputs are turned, as in `bitnet.convert`; BitNet v2: o_proj and down_proj,
            which read no norm's output.
        bits, granularity, block: of all inputs, see `Rotated`.

    Raises:
        InputError: options that do not fit.
    """

    rotate: Sequence[str] = ("o_proj", "down_proj")
    bits: int = 4
    granularity: Granularity = "row"
    block: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rotate, str) or not self.rotate or not all(isinstance(each, str) for each in self.rotate):
            raise InputError(
                f"activation.rotate must be a list of patterns of layers' names, got {self.rotate!r}: for no layer "
                "take activation=a4, for all of them ['*']"
            )
        self.rotated  # noqa: B018  # refuses the other options

    @property
    def rotated(self) -> Rotated:
        """The quantizer of a layer that is turned."""
        return Rotated(self.bits, self.granularity, self.block)

    @property
    def plain(self) -> Quantizer:
        """The quantizer of every other layer."""
        return self.rotated.quantizer
