"""A run that was stopped and resumed ends in the same bits as one that was not."""

import pytest
import torch
from toy_training import ToyData, ToyLanguageModel, toy_module, toy_trainer

from bitnet.training import LastAndBest, two_stage

STEPS = 12


def _module():
    torch.manual_seed(3)
    return toy_module(STEPS, model=ToyLanguageModel(dropout=0.2), schedule=two_stage(warmup=2))


def _run(root, *, until=STEPS, resume=None, length=10_000, val_check_interval=6, accumulate=2, every_n_steps=None):
    module = _module()
    trainer = toy_trainer(
        root,
        until,
        [LastAndBest(every_n_steps=every_n_steps)],
        enable_checkpointing=True,
        accumulate_grad_batches=accumulate,
        val_check_interval=val_check_interval,
        limit_val_batches=3,
    )
    torch.manual_seed(99)
    trainer.fit(module, datamodule=ToyData(length), ckpt_path=resume)
    return trainer, module


def _assert_same_bits(one, other):
    (trainer, module), (other_trainer, other_module) = one, other
    assert trainer.global_step == other_trainer.global_step == STEPS
    for (name, weight), (_, other_weight) in zip(
        module.state_dict().items(), other_module.state_dict().items(), strict=True
    ):
        assert torch.equal(weight, other_weight), name
    states = [t.optimizers[0].state_dict()["state"] for t in (trainer, other_trainer)]
    for key, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][key][name]), (key, name)


# Stops before, at and after a validation; saved at the end of a batch or of a validation.
@pytest.mark.parametrize("stop", [1, 3, 5, 6, 7])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, stop):
    straight = _run(tmp_path / "straight")
    _run(tmp_path / "stopped", until=stop)
    resumed = _run(tmp_path / "stopped", resume=tmp_path / "stopped/checkpoints/last.ckpt")
    _assert_same_bits(straight, resumed)


def test_the_best_checkpoint_resumes_to_the_same_bits(tmp_path):
    straight = _run(tmp_path / "straight")
    _run(tmp_path / "stopped", until=3)
    _assert_same_bits(straight, _run(tmp_path / "stopped", resume=tmp_path / "stopped/checkpoints/best.ckpt"))


def test_a_run_without_accumulation_resumes_to_the_same_bits(tmp_path):
    straight = _run(tmp_path / "straight", accumulate=1)
    _run(tmp_path / "stopped", until=7, accumulate=1)
    _assert_same_bits(
        straight, _run(tmp_path / "stopped", accumulate=1, resume=tmp_path / "stopped/checkpoints/last.ckpt")
    )


def test_training_bits_do_not_depend_on_how_often_one_validates_or_saves(tmp_path):
    _assert_same_bits(_run(tmp_path / "a", val_check_interval=2, every_n_steps=1), _run(tmp_path / "b"))


def test_random_states_matter_in_this_toy(tmp_path, monkeypatch):
    """Without them the resumed run ends elsewhere: the tests above could fail."""
    straight = _run(tmp_path / "straight")
    _run(tmp_path / "stopped", until=5)
    monkeypatch.setattr("bitnet.training.random_state.restore_random_state", lambda state: None)
    resumed = _run(tmp_path / "stopped", resume=tmp_path / "stopped/checkpoints/last.ckpt")
    with pytest.raises(AssertionError):
        _assert_same_bits(straight, resumed)


def test_tokens_are_counted_on_after_a_resume(tmp_path):
    _run(tmp_path, until=5)
    _, module = _run(tmp_path, resume=tmp_path / "checkpoints/last.ckpt")
    assert module.tokens == STEPS * 2 * 4 * 8
