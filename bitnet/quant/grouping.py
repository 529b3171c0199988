"""Granularity: how many values share one scale.

``"tensor"``  one scale for everything;
``"row"``     one scale a row, which for an activation [batch, tokens, features] means one a token;
an integer    one scale for every so many columns of a row; the last group may be narrower.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError

Granularity = Literal["tensor", "row"] | int


def group_size_of(granularity: Granularity) -> int | None:
    """Columns that share a scale, None where a whole row (or more) does.

    Raises:
        InputError: ``granularity`` is none of "tensor", "row" and a positive integer.
    """
    if isinstance(granularity, int) and not isinstance(granularity, bool) and granularity > 0:
        return granularity
    if granularity in ("tensor", "row"):
        return None
    raise InputError(f'granularity must be "tensor", "row" or a positive group size, got {granularity!r}')


def grouped(x: Float[Tensor, "*rows cols"], granularity: Granularity) -> Float[Tensor, "*scale_rows groups size"]:
    """Put the values that share a scale into the last dimension; a narrow last group is filled up with zeros."""
    size = group_size_of(granularity)
    if size is not None:
        missing = -x.shape[-1] % size
        padded = F.pad(x, (0, missing)) if missing else x  # padding by nothing would copy
        return padded.unflatten(-1, (-1, size))
    if granularity == "row":
        return x.unsqueeze(-2)
    return x.reshape(*(1,) * x.dim(), -1)


def members(x: Float[Tensor, "*rows cols"], granularity: Granularity) -> int | Float[Tensor, " groups"]:
    """How many values of ``x`` share each scale of a row; all groups but the last have the same count."""
    size = group_size_of(granularity)
    columns = x.shape[-1]
    if size is None:
        return x.numel() if granularity == "tensor" else columns
    starts = torch.arange(0, columns, size, dtype=torch.float64, device=x.device)
    return (columns - starts).clamp(max=size)


@torch.library.custom_op("bitnet::per_column", mutates_args=())
def per_column(per_group: Tensor, group_size: int, columns: int) -> Tensor:
    """Repeat the last dimension, one value a group, so that there is one value for each of ``columns`` columns.

    Opaque to compilers: torch 2.13 on a CPU compiles ``x / s.repeat_interleave(20, -1)`` to wrong values, where the
    group is no multiple of its vectors.
    """
    return per_group.repeat_interleave(group_size, dim=-1)[..., :columns].contiguous()


@per_column.register_fake
def _(per_group: Tensor, group_size: int, columns: int) -> Tensor:
    return per_group.new_empty((*per_group.shape[:-1], columns))
