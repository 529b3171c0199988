"""Progress of a training run: a bar on a terminal, one plain line every so often on a pipe.

Lightning's Rich bar counts batches of an epoch, which a run of so many steps does not have ("Epoch 0/-2"), and on a
pipe it prints a single line. This one counts optimizer steps.
"""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from bitnet.errors import InputError
from bitnet.training.module import LanguageModelingModule


class TrainingProgress(ProgressBar):
    """Show step, loss, learning rate, tokens a second, time left and, once known, validation perplexity.

    Args:
        every_n_steps: steps between two refreshed figures (each fetches the loss from the device), and between two
            lines where the output is not a terminal.
        console: where to write; None: standard output.
    """

    def __init__(self, every_n_steps: int = 10, console: Console | None = None) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise InputError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self._every_n_steps = every_n_steps
        self._console = console or Console(highlight=False)
        self._bar: Progress | None = None
        self.is_enabled = True
        self._perplexity: float | None = None
        self._paused = False

    def disable(self) -> None:
        self.is_enabled = False  # on all ranks but the first

    def enable(self) -> None:
        self.is_enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self.is_enabled:
            self._console.print(*args, markup=False, soft_wrap=True, **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModelingModule)
        self._step = self._first_step = trainer.global_step
        self._mark: tuple[float, int] = (time.perf_counter(), pl_module.tokens)
        self._began = time.perf_counter()
        if self.is_enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
                console=self._console,
            )  # fmt: skip
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._task = self._bar.add_task("", total=total, completed=self._first_step, figures="")
            self._bar.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._paused:  # validation, samples and saving are not training: count tokens a second from here on
            assert isinstance(pl_module, LanguageModelingModule)
            self._mark, self._paused = (time.perf_counter(), pl_module.tokens), False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not self.is_enabled or step == self._step:
            return
        self._step = step
        due = step % self._every_n_steps == 0 or step in (self._first_step + 1, trainer.max_steps)
        figures = self._figures(trainer, pl_module) if due else None
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            if figures is not None:
                self._bar.update(self._task, figures=figures)
        elif figures is not None:
            self.print(f"step {step}/{trainer.max_steps}  {figures}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or "val/loss" not in trainer.callback_metrics:
            return
        self._paused = True
        loss = float(trainer.callback_metrics["val/loss"])
        self._perplexity = float(trainer.callback_metrics["val/perplexity"])
        self.print(f"step {trainer.global_step}  validation: loss {loss:.4f}, perplexity {self._perplexity:.2f}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _figures(self, trainer: Trainer, pl_module: LightningModule) -> str:
        assert isinstance(pl_module, LanguageModelingModule)
        loss = float("nan") if pl_module.step_loss is None else float(pl_module.step_loss)
        now = time.perf_counter()
        trained: int = pl_module.tokens
        then, tokens = self._mark
        self._mark = now, trained
        seconds_per_step = (now - self._began) / (self._step - self._first_step)  # validation and saving included
        parts = [
            f"loss {loss:.4f}",
            f"lr {pl_module.learning_rate:.2e}",
            f"{(trained - tokens) / (now - then):,.0f} tokens/s",
            f"{_duration(seconds_per_step * (trainer.max_steps - self._step))} left",
        ]
        if self._perplexity is not None:
            parts.append(f"val perplexity {self._perplexity:.2f}")
        return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
