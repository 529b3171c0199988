"""What binary methods ask of a weight, and of the scales that they found for it."""

import torch
from jaxtyping import Float
from torch import Tensor

from bitnet.errors import InputError


def alive(weight: Float[Tensor, "out in"], diagonal: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """A float32 copy of ``weight``, zero in the columns whose input never was anything else.

    Raises:
        InputError: a weight is NaN or infinite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise InputError("the weight holds NaN or infinity: check the checkpoint")
    return weight.float().masked_fill(diagonal == 0, 0.0)


def check_scales(*scales: Tensor, advice: str) -> None:
    """Scales that are as large as their dtype goes, or larger, belong to weights that are too large for it.

    Raises:
        InputError: one is.
    """
    for scale in scales:
        largest = torch.finfo(scale.dtype).max
        if not bool((scale.abs() < largest).all()):
            raise InputError(
                f"the weights are too large for scales in {scale.dtype}, which end at {largest:g}: {advice}"
            )
