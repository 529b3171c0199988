"""Which checkpoints a run keeps: the last and the best.

``last.ckpt`` is the run as it stands, ``best.ckpt`` the run at its lowest validation loss. Saving happens between whole
optimizer steps only. That includes Ctrl-C and SIGTERM: the signal is noted, the step under way is finished, the
checkpoint written, and the program ends with the command that goes on from there. Slurm's warning before a time limit
waits for the same moment; then it goes to whoever asked for it, who puts the job back into the queue.
"""

import math
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from bitnet.errors import InputError
from bitnet.files import atomic_file
from bitnet.training.warmup import warming_up

METRIC = "val/loss"
STOPS = (signal.SIGINT, signal.SIGTERM)
REQUEUES = (signal.SIGUSR2,) if hasattr(signal, "SIGUSR2") else ()  # submitit's; left alone where nobody handles it


class LastAndBest(Checkpoint):
    """Save ``last.ckpt`` after each validation, at the end and in between; ``best.ckpt`` at the lowest ``val/loss``.

    Both are in ``checkpoints`` in the trainer's root directory, which is the run's folder. While the quantization is
    warmed up no checkpoint is the best one: the loss is that of a model half dense.

    Args:
        every_n_steps: optimizer steps between two saves beside those after validation. None: none.

    Raises:
        InputError: a new run would overwrite the checkpoints of another one.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"every_n_steps must be at least 1, or null for none, got {every_n_steps}")
        self.best_loss: float | None = None
        self._every_n_steps = every_n_steps
        self._step = 0
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        directory = Path(trainer.default_root_dir) / "checkpoints"
        self.last, self.best = directory / "last.ckpt", directory / "best.ckpt"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for left in self.last.parent.glob(".*.ckpt.*.partial") if trainer.is_global_zero else ():
            left.unlink()  # by a run that was killed while it saved
        if trainer.ckpt_path is None and self.last.exists():
            raise InputError(
                f"{self.last} exists already: go on with resume={trainer.default_root_dir}, or choose another folder"
            )

    # When to save

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return  # gradients still accumulate, and they are not part of a checkpoint
        self._step = step
        number = self._stop_signal(trainer)
        due = self._every_n_steps is not None and step % self._every_n_steps == 0
        if due or number is not None or trainer.should_stop or step == trainer.max_steps:
            trainer.save_checkpoint(self.last, weights_only=False)
        if number is not None:
            if number in REQUEUES:
                self._pass_on(number)
                return
            pl_module.print(f"Stopped after step {step}. To go on: python train.py resume={trainer.default_root_dir}")
            # SIGTERM ends with the status that a shell gives it: an unfinished run must not look finished.
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = float(trainer.callback_metrics[METRIC])
        partly = warming_up(pl_module)
        improved = not partly and math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if improved:
            self.best_loss = loss
        trainer.save_checkpoint(self.last, weights_only=False)
        if improved and trainer.is_global_zero:
            with atomic_file(self.best) as partial:
                shutil.copyfile(self.last, partial)

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss = state_dict["best_loss"]

    # Signals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            for number in (*STOPS, *(each for each in REQUEUES if callable(signal.getsignal(each)))):
                self._handlers[number] = signal.signal(number, self._note)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_signals_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_signals_back()

    def _give_signals_back(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _pass_on(self, number: int) -> None:
        """Let the handler that stood here before do its work now. One that returns leaves the training running."""
        self._signal = None
        self._handlers[number](number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; let the second one through."""
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number
        after = "handing over" if number in REQUEUES else "stopping"
        print(
            f"\n{after.capitalize()} after this step; a second signal stops at once, at the last checkpoint.",
            flush=True,
        )

    def _stop_signal(self, trainer: Trainer) -> int | None:
        """The signal to stop for. All ranks must agree, since all of them take part in saving."""
        if trainer.world_size == 1:
            return self._signal
        if trainer.global_step % trainer.log_every_n_steps:  # pyright: ignore
            return None  # asking the others at every step would make each step wait for the slowest
        stop = trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)
        return (self._signal or signal.SIGTERM) if stop else None
