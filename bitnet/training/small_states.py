"""Optimizers that keep less beside each weight than AdamW's eight bytes; the weights themselves stay float32.

==========  ==================================  ==========================================
optimizer   bytes a weight beside the gradient  what is kept
==========  ==================================  ==========================================
AdamW       8                                   two float32 averages
AdamW8bit   2.03                                both averages as 8-bit codes, a float32 scale for each 256 of them
Adafactor   0.01                                the second moment as a row and a column of a matrix; no first
==========  ==================================  ==========================================

Both decay and learn in the groups of `bitnet.training.adamw`, at its learning rate and on its schedule.
"""

from importlib.util import find_spec
from typing import cast

from torch import nn
from torch.optim import Optimizer

from bitnet.errors import InputError
from bitnet.training.optim import parameter_groups


def adamw8bit(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    scale_lr: float = 1.0,
    min_8bit_size: int = 4096,
) -> Optimizer:
    """bitsandbytes' AdamW with averages of 8 bits in blocks of 256, in the groups of `bitnet.training.adamw`.

    Args:
        min_8bit_size: a tensor with fewer weights (a norm, a scale) keeps float32 averages.

    Raises:
        InputError: bitsandbytes is not installed, ``min_8bit_size`` is no whole number, or as `adamw` says.

    Source: 8-bit optimizers via block-wise quantization, arXiv:2110.02861.
    """
    if find_spec("bitsandbytes") is None:
        raise InputError(
            "optim=adamw8bit needs bitsandbytes, which is not installed: pip install 'bitnet-qat[bitsandbytes]', or "
            "choose optim=adafactor (less memory still) or optim=adamw"
        )
    if type(min_8bit_size) is not int or min_8bit_size < 0:
        raise InputError(f"optim.min_8bit_size must be a whole number of weights, got {min_8bit_size!r}")
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay, scale_lr=scale_lr)
    from bitsandbytes.optim import AdamW8bit

    made = AdamW8bit(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, min_8bit_size=min_8bit_size)
    return cast(Optimizer, made)


def adafactor(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    decay_rate: float = -0.8,
    clip_threshold: float = 1.0,
    scale_lr: float = 1.0,
) -> Optimizer:
    """transformers' Adafactor without a first moment, in the groups of `bitnet.training.adamw`.

    The learning rate is taken as it is (``scale_parameter`` and ``relative_step`` are off), so a step is about as large
    as one of AdamW and the schedules mean the same.

    Args:
        decay_rate: step t averages the squares with ``beta2 = 1 - t ** decay_rate``; between -1 and 0.
        clip_threshold: an update whose root mean square is larger is scaled down to it.

    Raises:
        InputError: values outside these ranges, or as `adamw` says.

    Source: Adafactor, arXiv:1804.04235, algorithms 4 and 5.
    """
    if not -1 <= decay_rate < 0:
        raise InputError(f"optim.decay_rate must lie between -1 and 0, got {decay_rate!r}")
    if not clip_threshold > 0:
        raise InputError(f"optim.clip_threshold must be positive, got {clip_threshold!r}")
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay, scale_lr=scale_lr)
    from transformers import Adafactor

    return Adafactor(
        groups,
        lr=lr,
        decay_rate=decay_rate,
        clip_threshold=clip_threshold,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )
