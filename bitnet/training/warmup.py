"""Quantize little by little: a pretrained model meets its quantizers over many steps instead of in the first one.

What a layer computes with moves from its values to their quantized form, ``value + share * (quantized - value)``, the
share rising from 0 to 1. It is a function of the number of completed optimizer steps alone, like the learning rate:
nothing of it is in a checkpoint, and a resumed run cannot disagree with an uninterrupted one.

Source: lambda warm-up of the 1.58-bit fine-tuning of Llama 3 (Hugging Face, 2024): min(step / 1000, 1).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning import Callback, LightningModule, Trainer

from bitnet.errors import InputError
from bitnet.nn import bit_linears

STEEPNESS = 6.0  # of the sigmoid: before scaling it runs from 1/(1+e^6) = 0.0025 to 0.9975


class Shares(NamedTuple):
    """How much of the weights, and of the inputs, is quantized: 0 none, 1 all."""

    weight: float
    input: float


def _linear(progress: float) -> float:
    return progress


def _cosine(progress: float) -> float:
    return 0.5 * (1 - math.cos(math.pi * progress))


def _sigmoid(progress: float) -> float:
    """A logistic curve, stretched to begin at 0 and end at 1."""
    start = _logistic(-STEEPNESS)
    return (_logistic(STEEPNESS * (2 * progress - 1)) - start) / (1 - 2 * start)


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


SHAPES: dict[str, Callable[[float], float]] = {"linear": _linear, "cosine": _cosine, "sigmoid": _sigmoid}


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The shares at a step: ``warmup(step, total_steps)``.

    Args:
        shape: "linear", "cosine" or "sigmoid": how a share goes from 0 to 1.
        weight: where that of the weights begins to rise and where it reaches 1: below 1 a share of the run, from 1 on a
            number of steps. [0, 0] quantizes from the first step on.
        input: the same for the inputs. Later than ``weight`` makes stages: dense, then W1.58, then W1.58A8.
        narrow: when inputs that end in fewer than 8 bits go down to them, in one step, as in BitNet a4.8 (arXiv:
            2411.04965, at 0.95 of its tokens); until then they have 8. None: they have theirs from the beginning.
        reset_optimizer: whether the optimizer begins anew (moments and their step count) with the first step that
            quantizes everything as in the end: what it gathered before is of another loss.

    Raises:
        InputError: an unknown shape, or no two ends in order.
    """

    shape: str = "linear"
    weight: Sequence[float | int] = (0, 0.2)
    input: Sequence[float | int] = (0, 0.2)
    narrow: float | int | None = None
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise InputError(f"warmup.shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        for name, ends in (("weight", self.weight), ("input", self.input)):
            if not _is_pair(ends):
                given = list(ends) if isinstance(ends, Sequence) and not isinstance(ends, str) else ends
                raise InputError(
                    f"warmup.{name} must be where it begins and where it ends, such as [0, 0.2], each a share of the "
                    f"run below 1 or a whole number of steps, got {given!r}"
                )
        if self.narrow is not None and not (_is_time(self.narrow) and self.narrow > 0):
            raise InputError(
                "warmup.narrow must be when the inputs go from 8 bits to fewer, a share of the run below 1 or a whole "
                f"number of steps, or null, got {self.narrow!r}"
            )

    def check(self, total_steps: int) -> None:
        """Raise InputError unless all has come to its end by the last of ``total_steps`` steps, in order."""
        for name, ends in (("weight", self.weight), ("input", self.input)):
            begin, end = (_steps(each, total_steps) for each in ends)
            if begin > end:
                raise InputError(f"warmup.{name} must end after it begins, got steps {begin} to {end}")
            if end >= total_steps:
                raise InputError(
                    f"the warm-up of the quantization must end before the last of the run's {total_steps} steps, and "
                    f"warmup.{name} ends at step {end}: give shares of the run such as [0, 0.2], or train longer"
                )
        if self.narrow is None:
            return
        step, quantized = _steps(self.narrow, total_steps), _steps(self.input[1], total_steps)
        if not max(quantized, 1) <= step < total_steps:
            raise InputError(
                f"warmup.narrow must come when the inputs are quantized (warmup.input ends at step {quantized}) and "
                f"before the last of the run's {total_steps} steps, got step {step}"
            )

    def __call__(self, step: int, total_steps: int) -> Shares:
        """The shares that step ``step`` runs with: the number of steps completed before it, 0 for the first."""
        return Shares(self._share(self.weight, step, total_steps), self._share(self.input, step, total_steps))

    def eight_bits(self, step: int, total_steps: int) -> bool:
        """Whether step ``step`` quantizes the inputs to 8 bits, and later ones to fewer."""
        return self.narrow is not None and step < _steps(self.narrow, total_steps)

    def complete_at(self, total_steps: int) -> int:
        """The first step that quantizes everything as in the end."""
        return max(_steps(end, total_steps) for end in (self.weight[1], self.input[1], self.narrow or 0))

    def _share(self, ends: Sequence[float | int], step: int, total_steps: int) -> float:
        begin, end = (_steps(each, total_steps) for each in ends)
        if step >= end:
            return 1.0
        return SHAPES[self.shape]((step - begin) / (end - begin)) if step > begin else 0.0


class QuantizationWarmup(Callback):
    """Set the shares of every `BitLinear` of the model before each step and each validation.

    A validation is of the model as it is at its step: during the warm-up of one that is quantized in part. Logs
    ``train/quantized_weight`` and ``train/quantized_input``, and with ``narrow`` ``train/eight_bit_inputs``, 1 or 0.

    Args:
        warmup: the shares at a step.
        total_steps: optimizer steps of the whole run.

    Raises:
        InputError: a warm-up that is longer than the run (at once), or a model without a `BitLinear`, or whose inputs
            do not end in fewer than 8 bits where they should (when it begins).
    """

    def __init__(self, warmup: WarmUp, total_steps: int) -> None:
        warmup.check(total_steps)
        self._warmup, self._total_steps = warmup, total_steps
        self._stage: tuple[Shares, bool] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not bit_linears(pl_module):
            raise InputError("a warm-up of the quantization needs a quantized model, and this one has no BitLinear")
        self._stage = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        shares, eight_bits = self._set(trainer, pl_module)
        if self._warmup.reset_optimizer and trainer.global_step == self._warmup.complete_at(self._total_steps):
            for optimizer in trainer.optimizers:  # at every batch of that step: nothing is gathered between them
                optimizer.state.clear()
        figures = {"train/quantized_weight": shares.weight, "train/quantized_input": shares.input}
        if self._warmup.narrow is not None:
            figures["train/eight_bit_inputs"] = float(eight_bits)
        pl_module.log_dict(figures)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._set(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._set(trainer, pl_module)

    def _set(self, trainer: Trainer, module: LightningModule) -> tuple[Shares, bool]:
        step = trainer.global_step
        stage = self._warmup(step, self._total_steps), self._warmup.eight_bits(step, self._total_steps)
        if stage != self._stage:
            for _, layer in bit_linears(module):
                layer.blend(*stage[0], eight_bits=stage[1])
            self._stage = stage
        return stage


def warming_up(module: LightningModule) -> bool:
    """Whether a layer is quantized in part, or its inputs have more bits than in the end."""
    return any(layer.warming_up for _, layer in bit_linears(module))


def _is_pair(ends: Any) -> bool:
    whole = isinstance(ends, Sequence) and not isinstance(ends, str) and len(ends) == 2
    return whole and all(_is_time(end) for end in ends)


def _is_time(end: Any) -> bool:
    return isinstance(end, int | float) and not isinstance(end, bool) and (0 <= end < 1 or 1 <= end == end // 1)


def _steps(end: float, total_steps: int) -> int:
    return round(end * total_steps) if end < 1 else int(end)
