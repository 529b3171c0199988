"""What a run shows of itself, on a terminal and on a pipe."""

import io
import re

import pytest
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from toy_training import ToyData, toy_module, toy_trainer

from bitnet.errors import InputError
from bitnet.training import TrainingProgress
from bitnet.training.progress import _duration


def _shown(root, *, terminal, steps=8, every=3, **options):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160, highlight=False)
    progress = TrainingProgress(every, console)
    trainer = toy_trainer(root, steps, [progress], enable_progress_bar=True, log_every_n_steps=100, **options)
    trainer.fit(toy_module(), datamodule=ToyData())
    return console.file.getvalue()


def test_a_pipe_gets_a_line_every_few_steps(tmp_path):
    lines = _shown(tmp_path, terminal=False, accumulate_grad_batches=2).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/8", "step 3/8", "step 6/8", "step 8/8"]
    figures = r"  loss \d\.\d{4}  lr 1\.00e-02  [\d,]+ tokens/s  \d+:\d\d left"
    assert all(re.fullmatch(r"step \d/8" + figures, line) for line in lines)


def test_validation_perplexity_is_shown_once_known(tmp_path):
    text = _shown(tmp_path, terminal=False, limit_val_batches=2, val_check_interval=4)
    before, after = text.split("step 4  validation: loss ")
    assert "val perplexity" not in before
    assert re.search(r"step 6/8 .* val perplexity \d+\.\d\d", after)


def test_a_terminal_gets_a_bar_of_optimizer_steps(tmp_path):
    text = _shown(tmp_path, terminal=True)
    assert "8/8" in text
    assert "tokens/s" in text
    assert "Epoch" not in text


def test_what_others_print_goes_through_the_console(tmp_path):
    class Talker(Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.print("[bold] words [/bold]")

    console = Console(file=io.StringIO(), width=160)
    trainer = toy_trainer(tmp_path, 1, [TrainingProgress(1, console), Talker()], enable_progress_bar=True)
    trainer.fit(toy_module(), datamodule=ToyData())
    assert "[bold] words [/bold]" in console.file.getvalue()


def test_time_reads_as_a_clock():
    assert [_duration(seconds) for seconds in (0, 65, 3600, 36_125.4)] == ["0:00", "1:05", "1:00:00", "10:02:05"]


def test_refreshing_every_zero_steps_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        TrainingProgress(0)
