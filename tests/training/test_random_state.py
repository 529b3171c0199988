"""Random states survive a weights-only checkpoint, and drawing between batches changes nothing."""

import random

import numpy as np
import torch

from bitnet.training.random_state import random_state, restore_random_state


def _draw():
    return [
        torch.rand(3).tolist(),
        [random.random(), random.gauss(0, 1)],
        np.random.rand(3).tolist(),
        np.random.randn(),
    ]


def test_what_is_drawn_after_restoring_is_what_was_drawn_after_keeping(tmp_path):
    random.gauss(0, 1)  # leaves half a pair behind, in each of these generators
    np.random.randn()
    torch.save(random_state(), tmp_path / "state.pt")
    first = _draw()
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert _draw() == first


def test_two_draws_differ_without_restoring():
    assert _draw() != _draw()
