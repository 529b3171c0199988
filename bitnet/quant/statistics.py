"""Means whose bits do not depend on who computes them.

A mean of 17 million floats depends in its last bits on the order of the additions, and a compiler is free to choose
another order than eager mode: the scale of a compiled layer would then differ from the scale that ``freeze()``
computes, and every output with it. So the two means that scales are made of are operators of their own, opaque to
the compiler, with one fixed order: each row (or group) is summed in float32, the sums are added in float64, and the
quotient is rounded once.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.quant.grouping import Granularity, group_size_of, grouped, members


def mean_magnitude(x: Float[Tensor, "*rows cols"], granularity: Granularity = "tensor") -> Float[Tensor, "*s groups"]:
    """Mean of ``|x|`` over the values that share a scale: float32, shaped like `QTensor.scale`, without gradient."""
    return _mean(x.detach(), granularity, magnitude=True)


def mean(x: Float[Tensor, "*rows cols"], granularity: Granularity = "tensor") -> Float[Tensor, "*s groups"]:
    """Mean of ``x`` over the values that share a scale: float32, shaped like `QTensor.scale`, without gradient."""
    return _mean(x.detach(), granularity, magnitude=False)


def _mean(x: Tensor, granularity: Granularity, *, magnitude: bool) -> Tensor:
    size = group_size_of(granularity)
    return torch.ops.bitnet.mean_of_groups(x, granularity == "tensor", size or 0, magnitude)


@torch.library.custom_op("bitnet::mean_of_groups", mutates_args=())
def _mean_of_groups(x: Tensor, whole_tensor: bool, group_size: int, magnitude: bool) -> Tensor:
    granularity = group_size or "row"
    groups = grouped(x, granularity)
    if magnitude:
        sums = torch.linalg.vector_norm(groups, 1, dim=-1, dtype=torch.float32)
    else:
        sums = groups.sum(-1, dtype=torch.float32)
    sums = sums.double()
    if whole_tensor:
        return (sums.sum() / x.numel()).float().reshape((1,) * x.dim())
    return (sums / members(x, granularity)).float()


@_mean_of_groups.register_fake
def _(x: Tensor, whole_tensor: bool, group_size: int, magnitude: bool) -> Tensor:
    if whole_tensor:
        return x.new_empty((1,) * x.dim(), dtype=torch.float32)
    groups = -(-x.shape[-1] // group_size) if group_size else 1
    return x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)
