"""NaN and infinity stop the run, by name, before they reach a checkpoint."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from toy_training import ToyData, ToyLanguageModel, toy_module, toy_trainer

from bitnet.errors import InputError
from bitnet.training import AtomicCheckpointIO, LastAndBest, NonFiniteError, NonFiniteGuard


class _Poison(Callback):
    """Makes what ``spoil`` does to the module happen at one step."""

    def __init__(self, step, spoil):
        self.step, self.spoil = step, spoil

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.spoil(pl_module)


def _spoil_loss(module):
    module.model.head.register_forward_hook(lambda layer, args, output: output * math.nan)


def _spoil_gradient(module):
    module.model.up.weight.register_hook(lambda gradient: gradient * math.inf)


class _WeightsBeforeStep(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.weights = {name: weight.clone() for name, weight in pl_module.state_dict().items()}


def _fit(root, *callbacks, module=None, every_n_steps=None):
    callbacks = [*callbacks, NonFiniteGuard(every_n_steps), LastAndBest(every_n_steps=1)]
    toy_trainer(root, 12, callbacks, enable_checkpointing=True).fit(module or toy_module(), datamodule=ToyData())


def _saved_step(root):
    return AtomicCheckpointIO().load_checkpoint(root / "checkpoints/last.ckpt")["global_step"]


def test_a_nan_loss_stops_the_run_with_its_step(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 5: expected a finite loss, got nan: .*optim.lr"):
        _fit(tmp_path, _Poison(5, _spoil_loss))


def test_an_infinite_gradient_stops_the_run_with_its_layer(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 5: .*infinity in 1 of 6 tensors, .*first in up.weight"):
        _fit(tmp_path, _Poison(5, _spoil_gradient))


@pytest.mark.parametrize("spoil", [_spoil_loss, _spoil_gradient])
def test_the_weights_and_the_last_checkpoint_stay_as_they_were(tmp_path, spoil):
    module, before = toy_module(), _WeightsBeforeStep()
    with pytest.raises(NonFiniteError):
        _fit(tmp_path, _Poison(5, spoil), before, module=module)
    assert _saved_step(tmp_path) == 5
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, before.weights[name]), name


def test_looking_less_often_still_saves_nothing_broken(tmp_path):
    with pytest.raises(NonFiniteError, match="step 6"):
        _fit(tmp_path, _Poison(5, _spoil_gradient), every_n_steps=100)
    assert _saved_step(tmp_path) == 5


def test_a_nan_weight_is_named_before_the_first_step(tmp_path):
    model = ToyLanguageModel()
    with torch.no_grad():
        model.down.weight[3, 4] = math.nan
    with pytest.raises(NonFiniteError, match=r"got 1 of 512 NaN or infinite in down.weight"):
        _fit(tmp_path, module=toy_module(model=model))
    assert not (tmp_path / "checkpoints").exists()


def test_the_error_is_one_that_train_py_prints_as_a_line():
    assert issubclass(NonFiniteError, InputError)


def test_a_healthy_run_is_left_alone(tmp_path):
    _fit(tmp_path)
    assert _saved_step(tmp_path) == 12


def test_looking_every_zero_steps_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        NonFiniteGuard(0)
