"""Schedules of learning rate and weight decay, as pure functions of the step.

A schedule answers ``(step, total_steps)`` with two factors, which multiply the learning rate and the weight decay of
every parameter group. It has no state, so a resumed run cannot disagree with an uninterrupted one. Each factory below
checks its knobs and returns such a function.

Every schedule warms up linearly: step ``s`` of ``w`` runs at ``(s + 1) / w``, so the first step already learns. A
warm-up below 1 is a share of the run, from 1 on it is a number of steps.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from bitnet.errors import InputError


class Factors(NamedTuple):
    """Multipliers of the configured learning rate and weight decay; 1 leaves them as configured."""

    lr: float
    weight_decay: float


Schedule = Callable[[int, int], Factors]


def constant(*, warmup: float = 0) -> Schedule:
    """Warm up, then stay."""
    return _schedule(warmup, lambda step, warmup_steps, total_steps: Factors(1.0, 1.0))


def cosine(*, warmup: float = 0.05, final: float = 0.1) -> Schedule:
    """Warm up, then half a cosine from 1 down to ``final`` at the last step."""
    _check_share("final", final)

    def decay(step: int, warmup_steps: int, total_steps: int) -> Factors:
        progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
        return Factors(final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)), 1.0)

    return _schedule(warmup, decay)


def wsd(*, warmup: float = 0.05, decay: float = 0.2, final: float = 0.0) -> Schedule:
    """Warmup, stable, decay: 1 until the last ``decay`` share of the run, then linearly towards ``final``.

    ``final`` would be reached one step after the last, so that the last step still learns when it is 0.
    Source: MiniCPM, arXiv:2404.06395.
    """
    _check_share("final", final)
    _check_share("decay", decay)

    def factors(step: int, warmup_steps: int, total_steps: int) -> Factors:
        start = max(warmup_steps, round(total_steps * (1 - decay)))
        progress = max(0, step - start) / max(1, total_steps - start)
        return Factors(1 - (1 - final) * progress, 1.0)

    return _schedule(warmup, factors)


def two_stage(*, warmup: float = 375, second_lr: float = 2 / 3, switch_at: float = 0.5, power: float = 1.0) -> Schedule:
    """BitNet b1.58: at half way the learning rate drops and weight decay ends.

    Both stages follow ``((total - step) / (total - warmup)) ** power``, a line to zero for ``power=1`` and flat for 0.
    From ``switch_at`` on it is multiplied by ``second_lr``, the ratio of the two published rates (1.5e-3 to 1e-3 at
    700M: 2/3; 1.2e-3 to 6.4e-4 at 3B: 0.53), and the weight decay is 0: latent weights then move freely enough for
    codes to settle. The published warm-up is 375 steps.

    Source: BitNet b1.58, arXiv:2402.17764, and its training tips.
    """
    _check_share("second_lr", second_lr)
    _check_share("switch_at", switch_at)
    if power < 0:
        raise InputError(f"power must be 0 (flat stages) or more, got {power}")

    def factors(step: int, warmup_steps: int, total_steps: int) -> Factors:
        switch = round(total_steps * switch_at)
        if warmup_steps > switch:
            raise InputError(
                f"the warm-up must end before the second stage begins at step {switch}, got {warmup_steps} steps: "
                "set schedule.warmup to a share of the run such as 0.1, or train longer"
            )
        line = ((total_steps - step) / (total_steps - warmup_steps)) ** power
        return Factors(line, 1.0) if step < switch else Factors(line * second_lr, 0.0)

    return _schedule(warmup, factors)


def _schedule(warmup: float, after_warmup: Callable[[int, int, int], Factors]) -> Schedule:
    """Put the warm-up in front of ``after_warmup(step, warmup_steps, total_steps)``, and check the steps."""
    if warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
        raise InputError(f"warmup must be a share below 1 or a whole number of steps, got {warmup}")

    def factors(step: int, total_steps: int) -> Factors:
        warmup_steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
        if warmup_steps >= total_steps:
            raise InputError(
                f"the warm-up must be shorter than the run of {total_steps} steps, got {warmup_steps} steps: "
                "set schedule.warmup to a share of the run such as 0.1, or train longer"
            )
        if not 0 <= step < total_steps:
            raise InputError(f"expected a step in 0 ... {total_steps - 1}, got {step}: raise total_steps to train on")
        settled = after_warmup(max(step, warmup_steps), warmup_steps, total_steps)
        return settled._replace(lr=settled.lr * min(1.0, (step + 1) / max(1, warmup_steps)))

    return factors


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{name} must be between 0 and 1, got {value}")
