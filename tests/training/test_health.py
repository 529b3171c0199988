"""Vital signs: right where they can be reckoned, said in words once, and of no influence on training."""

import pytest
import torch
from lightning.pytorch.loggers import Logger
from toy_training import ToyData, ToyLanguageModel, toy_module, toy_trainer

from bitnet.errors import InputError
from bitnet.training import HealthTelemetry, adamw


class _Kept(Logger):
    name = version = "kept"

    def __init__(self):
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        figures = {key: value for key, value in metrics.items() if key.startswith("health/")}
        if figures:
            self.rows[step] = figures

    def log_hyperparams(self, *args, **kwargs): ...


def _fit(root, *callbacks, steps=4, model=None, lr=1e-2, accumulate=1, **options):
    logger = _Kept()
    torch.manual_seed(1)
    module = toy_module(
        steps, model=model or ToyLanguageModel(dropout=0.2),
        optimizer=lambda model: adamw(model, lr=lr, weight_decay=0.1), **options,
    )  # fmt: skip
    trainer = toy_trainer(
        root, steps, callbacks, logger=logger, log_every_n_steps=100, accumulate_grad_batches=accumulate
    )
    trainer.fit(module, datamodule=ToyData())
    return module, logger.rows


def test_weights_are_the_same_bits_with_and_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr("bitnet.training.random_state.restore_random_state", lambda state: None)  # it would hide draws
    plain, _ = _fit(tmp_path)
    watched, rows = _fit(tmp_path, HealthTelemetry(1, flips=True))
    assert len(rows) == 4
    states = plain.state_dict(), watched.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_it_looks_every_few_optimizer_steps(tmp_path):
    assert list(_fit(tmp_path, HealthTelemetry(2), steps=5, accumulate=2)[1]) == [2, 4]


def test_zeros_and_scale_are_those_of_the_layer(tmp_path):
    module, rows = _fit(tmp_path, HealthTelemetry(2))
    weight = module.model.up.weight.detach()
    scale = weight.abs().mean()
    assert rows[4]["health/up/zeros"] == pytest.approx((weight.abs() <= scale / 2).float().mean().item())
    assert rows[2]["health/up/scale_drift"] == 1
    assert rows[4]["health/up/scale_drift"] != 1


def test_the_mean_over_layers_is_logged_beside_them(tmp_path):
    row = _fit(tmp_path, HealthTelemetry(4))[1][4]
    assert row["health/zeros"] == pytest.approx((row["health/up/zeros"] + row["health/down/zeros"]) / 2)


def test_flips_are_counted_since_the_last_look_on_request(tmp_path):
    rows = _fit(tmp_path, HealthTelemetry(2, flips=True), lr=0.1)[1]
    assert "health/up/flips" not in rows[2]
    assert 0 < rows[4]["health/up/flips"] < 1
    assert "health/up/flips" not in _fit(tmp_path, HealthTelemetry(2))[1][4]


def test_updates_too_small_for_the_weights_are_counted_as_lost(tmp_path):
    rows = {lr: _fit(tmp_path, HealthTelemetry(2), lr=lr)[1][4] for lr in (1e-2, 1e-11)}
    assert rows[1e-2]["health/up/lost_updates"] < 0.01
    assert rows[1e-11]["health/up/lost_updates"] > 0.9


def test_edges_are_the_share_of_input_codes_at_the_ends(tmp_path):
    """Each token's largest input is at an end; of sixteen equal ones all are."""

    class Flat(torch.nn.Module):
        def forward(self, x):
            return torch.ones_like(x)

    model = ToyLanguageModel()
    model.norm = Flat()
    row = _fit(tmp_path, HealthTelemetry(1), steps=1, model=model)[1][1]
    assert row["health/up/edges"] == 1
    usual = _fit(tmp_path, HealthTelemetry(1), steps=1)[1][1]
    assert 1 / 16 <= usual["health/up/edges"] < 0.2


def test_a_sick_figure_is_said_once_in_words(tmp_path, capsys):
    _fit(tmp_path, HealthTelemetry(1), lr=1e-11)
    lines = [line for line in capsys.readouterr().out.splitlines() if "lost_updates" in line]
    assert len(lines) == 1
    assert "Health warning at step 1: lost_updates is" in lines[0]
    assert "2 of 2 layers are outside" in lines[0]


def test_healthy_training_says_nothing(tmp_path, capsys):
    _fit(tmp_path, HealthTelemetry(1, flips=True), model=ToyLanguageModel(width=64))
    assert "Health warning" not in capsys.readouterr().out


def test_no_hook_stays_behind(tmp_path):
    module, _ = _fit(tmp_path, HealthTelemetry(1))
    assert not module.model.up._forward_pre_hooks
    assert module.model.dropout.training


def test_looking_every_zero_steps_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        HealthTelemetry(0)
