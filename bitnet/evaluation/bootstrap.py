"""How sure a mean over tokens is: a 95 % interval from resampled windows.

Tokens of one window are correlated (one topic, one author, one context), so a standard error that counts tokens is too
small. Here whole windows are drawn with replacement, as many as there are, and the mean is taken of each draw. Two
columns of one call see the same draws: of a difference between two models on the same windows only what differs counts.
"""

import numpy as np
import torch
from torch import Tensor

from bitnet.errors import InputError

LEVEL = 0.95
CELLS = 1 << 22  # counts held at once: 32 MB


def bootstrap_intervals(sums: Tensor, tokens: Tensor, *, resamples: int = 2000, seed: int = 0) -> Tensor:
    """Return the 95 % percentile interval of each column's mean per token, float64 [columns, 2] (low, high).

    Args:
        sums: float64 [windows, columns], each window's sum over its tokens.
        tokens: [windows], tokens in each window.
        resamples: draws of all windows; 2000 hold the ends still to about a twentieth of the interval.
        seed: of the draws, which are the same on every machine.

    Raises:
        InputError: fewer than two windows (there is nothing to resample), or fewer than 40 draws.
    """
    windows = len(tokens)
    if windows < 2:
        raise InputError(f"an interval needs at least 2 windows of text, got {windows}: evaluate more text")
    if resamples < 40:
        raise InputError(f"evaluation.bootstrap must be at least 40 draws (or null for no interval), got {resamples}")
    generator = np.random.default_rng(seed)
    totals = torch.cat([sums, tokens.double()[:, None]], dim=1)
    drawn = []
    for begin in range(0, resamples, rows := max(1, CELLS // windows)):
        size = min(rows, resamples - begin)
        counts = generator.multinomial(windows, np.full(windows, 1 / windows), size=size)
        drawn.append(torch.from_numpy(counts).double() @ totals)
    resampled = torch.cat(drawn)
    means = resampled[:, :-1] / resampled[:, -1:]
    tail = (1 - LEVEL) / 2
    return torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0).T
