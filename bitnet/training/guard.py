"""Stop at the first loss or gradient that is not finite, before it reaches the weights.

A NaN trains on in silence: the optimizer writes it into every weight, the run ends with status 0 and its checkpoint is
worthless. Here the step's loss and gradient norm are looked at between the backward pass and the optimizer's step. The
gradients are already reduced over ranks there, so every rank stops at the same place.
"""

import math
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from bitnet.errors import InputError
from bitnet.training.module import LanguageModelingModule


class NonFiniteError(InputError):
    """The loss, a gradient or a weight is NaN or infinite: the message names the step, the place, and what to try."""


_ADVICE = (
    "nothing was saved since; lower optim.lr, lengthen schedule.warmup or tighten trainer.gradient_clip_val, and "
    "start again or resume from the last checkpoint"
)


class NonFiniteGuard(Callback):
    """Raise `NonFiniteError` for a loss, gradient or initial weight that is NaN or infinite.

    Args:
        every_n_steps: how often to look. None: every step on a CPU, where looking is free, and every 10th on an
            accelerator, where it waits for the device. Whatever it is, nothing is saved without a look, so that the
            last checkpoint stays good; looking less often only blurs which step and which layer came first.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(
                f"every_n_steps must be at least 1, got {every_n_steps}: set callbacks.guard=null for none"
            )
        self._every_n_steps = every_n_steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model that holds NaN or infinity before it has trained at all."""
        for name, weight in pl_module.named_parameters():
            count = int((~weight.isfinite()).sum())
            if count:
                raise NonFiniteError(
                    f"expected finite weights to start from, got {count} of {weight.numel()} NaN or infinite in "
                    f"{name.removeprefix('model.')}: initialize the model anew or load another one"
                )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        every = self._every_n_steps or (1 if pl_module.device.type == "cpu" else 10)
        if trainer.global_step % every == 0:
            _check_step(pl_module, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = float(trainer.callback_metrics.get("val/loss", 0.0))
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not math.isfinite(loss):
            raise NonFiniteError(
                f"step {trainer.global_step}: expected a finite validation loss, got {loss}: {_ADVICE}"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:  # validating, too, is part of a fit
            _check_step(pl_module, trainer.global_step)


def _check_step(module: LightningModule, step: int) -> None:
    assert isinstance(module, LanguageModelingModule)
    loss, norm = module.step_loss, module.gradient_norm()
    if loss is None or math.isfinite(float(loss + norm)):  # one number to fetch; a sum of finite ones is finite
        return
    if not math.isfinite(float(loss)):
        raise NonFiniteError(f"step {step}: expected a finite loss, got {float(loss)}: {_ADVICE}")
    raise NonFiniteError(f"step {step}: expected finite gradients, got {_first_gradient(module, norm)}: {_ADVICE}")


def _first_gradient(module: nn.Module, norm: Tensor) -> str:
    """Where the backward pass met its first non-finite gradient: it runs from the last layer to the first."""
    gradients: dict[str, Tensor] = {
        name.removeprefix("model."): p.grad for name, p in module.named_parameters() if p.grad is not None
    }
    broken = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
    if not broken:
        return f"a norm of {float(norm)}"
    return f"NaN or infinity in {len(broken)} of {len(gradients)} tensors, on the way back first in {broken[-1]}"
