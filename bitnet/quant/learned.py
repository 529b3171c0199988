"""Weights whose scale is a parameter: LSQ, and the stretched elastic quantization of ParetoQ.

A rule (`LSQ`, `SEQ`) says which codes there are and how the scale learns; `LearnedScale` is the rule with the scale of
one layer. The value is ``code * scale``, exactly. The gradient reaches the weight straight through inside the range
that is not clipped, and the scale by the derivative of the rounded value, rounding itself counted as the identity:

    v = weight / scale          d value / d weight = 1 where low < v < high, else 0
                                d value / d scale  = code - v where low < v < high, else code

The scale is an ordinary float32 parameter. It is kept positive by a floor that every use of it applies (`FLOOR`), the
derivative of which counts as 1, so that a scale that was pushed below comes back. Not by an exponential: a compiler's
differs from eager mode's in the last bit, and the frozen layer would differ from the trained one.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitnet.errors import InputError
from bitnet.quant.absmax import check_bits
from bitnet.quant.grouping import Granularity, group_size_of, grouped, members, per_column
from bitnet.quant.rounding import round_to_codes
from bitnet.quant.statistics import mean_magnitude
from bitnet.quant.types import QTensor

FLOOR = 1e-8  # of a learned scale; the step of int8 weights of size 1e-5 is still eight times as large
SHARES = 100  # scales that init=mse compares: 1 % to 100 % of the one that covers the maximum
INITS = ("mean", "absmax", "mse")


@dataclass(frozen=True, slots=True)
class LSQ:
    """Learned step size: the codes -2^(bits-1) ... 2^(bits-1) - 1 times a learned scale, without a zero point.

    The gradient of the scale is multiplied by ``1 / sqrt(N Q)``, N the weights that share it and Q the largest code.

    Args:
        bits: 2 to 8.
        granularity: what shares a scale, "tensor", "row" or a group size.
        init: the scale to begin with: "mean", 2 mean|w| / sqrt(Q) as published; "absmax", max|w| / Q; "mse", the one
            of a hundred shares of that with the least squared error.

    Raises:
        InputError: options that do not fit.

    Source: Learned step size quantization, arXiv:1902.08153, eq. 1-3 and sec. 2.2.
    """

    bits: int = 4
    granularity: Granularity = "row"
    init: str = "mean"

    odd: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _check(self.granularity, self.init)

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def bounds(self) -> tuple[float, float]:
        """Where clipping begins, in units of the scale: beyond, the weight has no gradient."""
        return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1

    def for_weight(self, weight: Float[Tensor, "out in"]) -> "LearnedScale":
        """The quantizer of a layer that begins with ``weight``."""
        return LearnedScale(self, _initial_scale(self, weight))

    def quantize(self, weight: Float[Tensor, "out in"], scale: Tensor) -> QTensor:
        """Codes of ``weight`` at ``scale``: half to even, in float32."""
        scale = scale.clamp(min=FLOOR)
        size, (low, high) = group_size_of(self.granularity), self.bounds
        return QTensor(round_to_codes(weight, scale, size, int(low), int(high)), scale, self.levels, group_size=size)


@dataclass(frozen=True, slots=True)
class SEQ:
    """Stretched elastic quantization: [-a, a] in 3 or 4 equal cells, each value the middle of its cell, a learned.

    1.58 bits: the codes -1, 0, +1 times 2a/3. 2 bits: the odd codes -3, -1, +1, +3 times a/4, no zero among them. The
    parameter is the multiplier of the codes (2a/3, a/4), not a. Its gradient is multiplied as in `LSQ`.

    Args:
        bits: 1.58 or 2. For 3 and 4 bits ParetoQ takes `LSQ`.
        granularity: what shares a scale, "tensor", "row" or a group size.
        init: the range to begin with: "absmax", a = max|w| as ParetoQ's code has it; "mean" and "mse" as in `LSQ`.

    Raises:
        InputError: options that do not fit.

    Source: ParetoQ, arXiv:2502.02631, sec. 3 (SEQ); a value on the border of two cells goes half to even.
    """

    bits: float | int = 2
    granularity: Granularity = "row"
    init: str = "absmax"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in (1.58, 2):
            raise InputError(
                f"stretched elastic quantization has 1.58 or 2 bits, got {self.bits!r}: for 3 and 4 take quantizer=lsq"
            )
        _check(self.granularity, self.init)

    @property
    def odd(self) -> bool:
        """Whether the codes are odd numbers."""
        return self.bits == 2

    @property
    def levels(self) -> int:
        return 4 if self.odd else 3

    @property
    def bounds(self) -> tuple[float, float]:
        """Where clipping begins, in units of the scale: the outer border of the outer cells."""
        return (-4.0, 4.0) if self.odd else (-1.5, 1.5)

    def for_weight(self, weight: Float[Tensor, "out in"]) -> "LearnedScale":
        """The quantizer of a layer that begins with ``weight``."""
        return LearnedScale(self, _initial_scale(self, weight))

    def quantize(self, weight: Float[Tensor, "out in"], scale: Tensor) -> QTensor:
        """Codes of ``weight`` at ``scale``: half to even, in float32."""
        scale = scale.clamp(min=FLOOR)
        size = group_size_of(self.granularity)
        if not self.odd:
            return QTensor(round_to_codes(weight, scale, size, -1, 1), scale, self.levels, group_size=size)
        cells = (weight.float() / _columns(scale, size, weight.shape[-1])).mul_(0.5).sub_(0.5).round_()
        codes = cells.clamp_(-2, 1).mul_(2).add_(1).to(torch.int8)
        return QTensor(codes, scale, self.levels, group_size=size, odd=True)


LearnedRule = LSQ | SEQ


class LearnedScale(nn.Module):
    """A `LearnedRule` and the scale of one layer: a quantizer of that layer's weight.

    Attributes:
        rule: which codes there are.
        scale: the parameter, float32, in the shape of `QTensor.scale`: [1, 1], [out, 1] or [out, groups].
    """

    def __init__(self, rule: LearnedRule, scale: Float[Tensor, "rows groups"]) -> None:
        super().__init__()
        self.rule = rule
        self.scale = nn.Parameter(scale.detach().float().contiguous())

    def forward(self, weight: Float[Tensor, "out in"]) -> QTensor:
        """Codes of ``weight``, and the scale as it stands; without gradient."""
        return self.rule.quantize(weight.detach(), self.scale.detach())

    def extra_repr(self) -> str:
        return repr(self.rule)


def learned_gradients(
    rule: LearnedRule, weight: Float[Tensor, "out in"], q: QTensor, grad: Float[Tensor, "out in"]
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "rows groups"]]:
    """Gradients of the weight and of its scale, float32, from ``grad``, the gradient of the values of ``q``."""
    low, high = rule.bounds
    units = weight.float() / q.per_column(q.scale)
    inside = (units > low) & (units < high)
    grad = grad.float()
    residue = q.qdata.float() - torch.where(inside, units, 0.0)
    of_scale = grouped(grad * residue, rule.granularity).sum(-1).reshape(q.scale.shape)
    return torch.where(inside, grad, 0.0), of_scale * _gradient_scale(rule, weight)


def _gradient_scale(rule: LearnedRule, weight: Tensor) -> float | Tensor:
    """1 / sqrt(N Q) for each scale of a row; a narrow last group has a smaller N."""
    count = members(weight, rule.granularity)
    top = _top(rule)
    return 1 / math.sqrt(count * top) if isinstance(count, int) else (count * top).rsqrt().float()


def _top(rule: LearnedRule) -> int:
    """The largest code."""
    return rule.levels - 1 if rule.odd else (rule.levels - 1) // 2


def _check(granularity: Granularity, init: str) -> None:
    group_size_of(granularity)
    if init not in INITS:
        raise InputError(f"init must be one of {', '.join(INITS)}, got {init!r}")


def _columns(scale: Tensor, size: int | None, columns: int) -> Tensor:
    return scale if size is None else per_column(scale, size, columns)


@torch.no_grad()
def _initial_scale(rule: LearnedRule, weight: Tensor) -> Tensor:
    weight = weight.detach().float()
    if rule.init == "mean":
        return (mean_magnitude(weight, rule.granularity) * (2 / math.sqrt(_top(rule)))).clamp(min=FLOOR)
    reach = rule.bounds[1]  # of LSQ the largest code, of SEQ the outer border
    covering = (grouped(weight, rule.granularity).abs().amax(-1) / reach).clamp(min=FLOOR)
    return covering if rule.init == "absmax" else _least_error(rule, weight, covering)


def _least_error(rule: LearnedRule, weight: Tensor, covering: Tensor) -> Tensor:
    """The share of ``covering`` with the least squared error, for each scale by itself; the largest of equals."""
    best, least = covering, torch.full_like(covering, torch.inf)
    for percent in range(SHARES, 0, -1):
        scale = (covering * (percent / SHARES)).clamp(min=FLOOR)
        error = (rule.quantize(weight, scale).dequantize() - weight).square()
        error = grouped(error, rule.granularity).sum(-1).reshape(covering.shape)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
