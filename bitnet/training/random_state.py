"""Randomness of the training steps, kept apart from everything between them.

Dropout must see the same numbers after a resume as in a run that was never stopped. Making a loader, validating,
writing samples and crossing an epoch all draw from the same global generators, at places that a resumed run does not
repeat. So the state at the end of each training batch is kept, put back at the start of the next, and stored in the
checkpoint: training has a stream of its own, whatever happens in between. Cost: about 0.1 ms a batch.
"""

import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

_KEY = "random_state"


class RandomState(Callback):
    """Store torch, Python and numpy random states in checkpoints, and continue from them.

    Each rank's own states are stored. A checkpoint of another number of ranks starts from fresh ones: the checkpoint's
    own check says in words that the bits will differ.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._state is not None:
            restore_random_state(self._state)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._state = random_state()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [self._state]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, self._state)
        checkpoint[_KEY] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get(_KEY, [])
        if len(states) == trainer.world_size:
            self._state = states[trainer.global_rank]


def random_state() -> dict[str, Any]:
    """The states of the global generators as bytes and numbers, fit for a weights-only load and a gather over ranks."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": [str(name), np.asarray(keys).tobytes(), int(position), int(has_gauss), float(gauss)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo everything drawn since `random_state` returned ``state``."""
    torch.set_rng_state(_bytes(state["torch"]))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, numpy_gauss = state["numpy"]
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, numpy_gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
