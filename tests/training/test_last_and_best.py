"""Which checkpoints are kept, and what a signal or a kill leaves."""

import itertools
import os
import signal
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from toy_training import ToyData, toy_module, toy_trainer

from bitnet.errors import InputError
from bitnet.training import AtomicCheckpointIO, LastAndBest


def _fit(root, steps=4, callbacks=(), keep=None, resume=None, losses=(), **options):
    keep = keep or LastAndBest()
    module = toy_module()
    if losses:  # in the place of the real validation losses
        fixed = iter(losses)
        module.on_validation_epoch_end = lambda: module.log("val/loss", next(fixed))
    options = {"limit_val_batches": 2, "val_check_interval": 2} | options
    trainer = toy_trainer(root, steps, [*callbacks, keep], enable_checkpointing=True, **options)
    trainer.fit(module, datamodule=ToyData(), ckpt_path=resume)
    return keep


def _step_of(path):
    return AtomicCheckpointIO().load_checkpoint(path)["global_step"]


def test_best_is_the_lowest_validation_loss_and_last_the_latest(tmp_path):
    keep = _fit(tmp_path, 6, losses=(3.0, 2.0, 2.5))
    assert (_step_of(keep.best), _step_of(keep.last)) == (4, 6)
    assert sorted(path.name for path in keep.last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_resumed_run_remembers_the_best_loss(tmp_path):
    keep = _fit(tmp_path, 2, losses=(2.0,))
    keep = _fit(tmp_path, 4, losses=(2.5,), resume=keep.last)
    assert keep.best_loss == 2.0
    assert _step_of(keep.best) == 2


def test_the_last_step_is_saved_without_any_validation(tmp_path):
    assert _step_of(_fit(tmp_path, 3, limit_val_batches=0).last) == 3


def test_saving_every_n_steps_counts_optimizer_steps(tmp_path):
    saved = []

    class Recording(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            saved.append(checkpoint["global_step"])

    _fit(
        tmp_path, 7, keep=LastAndBest(every_n_steps=3), limit_val_batches=0, accumulate_grad_batches=2,
        plugins=[Recording()],
    )  # fmt: skip
    assert saved == [3, 6, 7]


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path):
    _fit(tmp_path)
    with pytest.raises(InputError, match=r"last.ckpt exists already: go on with resume="):
        _fit(tmp_path)


class _SignalInStep(Callback):
    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_it_and_says_how_to_go_on(tmp_path, capsys, number, status):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        _fit(tmp_path, 12, [_SignalInStep(number, 5)], accumulate_grad_batches=2, limit_val_batches=0)
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    last = tmp_path / "checkpoints/last.ckpt"
    assert caught.value.code == status
    assert _step_of(last) == 6
    assert f"Stopped after step 6. To go on: python train.py resume={tmp_path}" in capsys.readouterr().out


def test_a_scheduler_s_signal_goes_to_its_handler_once_the_step_is_saved(tmp_path):
    last, seen = tmp_path / "checkpoints/last.ckpt", []

    def requeue(number, frame):
        seen.append(_step_of(last))
        if len(seen) == 2:
            raise SystemExit(7)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit) as caught:
            _fit(
                tmp_path, 12, [_SignalInStep(signal.SIGUSR2, 3), _SignalInStep(signal.SIGUSR2, 5)], limit_val_batches=0
            )
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert caught.value.code == 7
    assert seen == [4, 6]  # a handler that returns leaves the training running


def test_a_signal_that_nobody_handles_is_left_alone(tmp_path):
    class Look(Callback):
        def on_train_batch_start(self, *_):
            assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL

    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    _fit(tmp_path, 2, [Look()])


def test_signal_handlers_are_given_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    _fit(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_kill_in_the_middle_of_saving_leaves_a_checkpoint_that_loads(tmp_path):
    """Each round saves without end, and is killed a little later after its first save than the round before."""
    last, steps = tmp_path / "last.ckpt", [0]
    for round_ in range(8):
        child = os.fork()
        if child == 0:
            for step in itertools.count(steps[-1] + 1):
                AtomicCheckpointIO().save_checkpoint(
                    {"global_step": step, "weight": torch.full((500_000,), step)}, last
                )
        while not last.exists():
            time.sleep(0.001)
        time.sleep(0.05 + 0.003 * round_)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        checkpoint = AtomicCheckpointIO().load_checkpoint(last)
        assert (checkpoint["weight"] == checkpoint["global_step"]).all()
        steps.append(checkpoint["global_step"])
    assert steps == sorted(set(steps))


def test_what_a_killed_save_left_is_cleared_away(tmp_path):
    left = tmp_path / "checkpoints/.last.ckpt.01234567.partial"
    left.parent.mkdir()
    left.touch()
    _fit(tmp_path)
    assert not left.exists()
