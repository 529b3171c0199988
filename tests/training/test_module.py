"""The loss, the schedule at work, validation figures, compilation, and ids that do not exist."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from toy_training import ToyData, ToyLanguageModel, toy_module, toy_trainer

from bitnet.errors import InputError
from bitnet.training import adamw, constant, two_stage


class _Recorder(ToyLanguageModel):
    """Keeps what it is called with."""

    def forward(self, **inputs):
        self.calls.append(inputs)
        return super().forward(**inputs)


def _batch(**more):
    ids = torch.randint(0, 23, (2, 8))
    return {"input_ids": ids, "labels": ids.clone()} | more


def _loss(module, batch):
    module._trainer = SimpleNamespace(world_size=1)
    return module.training_step(batch, 0)


def test_the_loss_is_the_mean_over_predicted_next_tokens():
    module, batch = toy_module(), _batch()
    batch["labels"][0, :5] = -100
    logits = module.model(batch["input_ids"]).logits.double().log_softmax(-1)
    nll = [
        -logits[row, t, label].item()
        for row in range(2)
        for t in range(7)
        if (label := batch["labels"][row, t + 1].item()) != -100
    ]
    assert len(nll) == 10
    assert _loss(module, batch).item() == pytest.approx(sum(nll) / 10, rel=1e-5)


def test_a_batch_without_targets_has_loss_zero_and_no_gradient():
    module, batch = toy_module(), _batch()
    batch["labels"].fill_(-100)
    loss = _loss(module, batch)
    loss.backward()
    assert loss.item() == 0
    assert module.model.head.weight.grad.abs().max() == 0


def test_the_loss_of_a_half_precision_network_is_float32():
    class Half(ToyLanguageModel):
        def forward(self, **inputs):
            return SimpleNamespace(logits=super().forward(**inputs).logits.bfloat16())

    assert _loss(toy_module(model=Half()), _batch()).dtype == torch.float32


def test_the_network_gets_positions_where_the_batch_has_them_and_never_a_cache():
    module = toy_module(model=_Recorder())
    positions = torch.arange(8).expand(2, 8)
    _loss(module, _batch())
    _loss(module, _batch(position_ids=positions))
    first, second = module.model.calls
    assert "position_ids" not in first
    assert first["use_cache"] is False
    assert torch.equal(second["position_ids"], positions)


@pytest.mark.parametrize("key", ["input_ids", "labels"])
@pytest.mark.parametrize("token", [23, -1])
def test_an_id_outside_the_vocabulary_is_refused(key, token):
    batch = _batch()
    batch[key][1, 3] = token
    with pytest.raises(InputError, match=rf"{key} must be in 0 ... 22, the model's vocabulary, got {token}"):
        _loss(toy_module(), batch)


def test_a_schedule_that_does_not_fit_is_refused_when_the_module_is_made():
    with pytest.raises(InputError, match="warm-up"):
        toy_module(100, schedule=two_stage())


def test_rates_and_decay_follow_the_schedule_step_by_step(tmp_path):
    seen = []

    class Seeing(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([(group["lr"], group["weight_decay"]) for group in self.param_groups])
            return super().step(closure)

    def optimizer(model):
        return Seeing([{"params": [model.up.weight], "weight_decay": 0.5}, {"params": [model.head.weight]}], lr=0.1)

    module = toy_module(8, optimizer=optimizer, schedule=two_stage(warmup=2, second_lr=0.5, power=0))
    toy_trainer(tmp_path, 8, accumulate_grad_batches=2).fit(module, datamodule=ToyData())
    rates = [0.05, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]
    assert [step[0] for step in seen] == [(rate, 0.5 if n < 4 else 0.0) for n, rate in enumerate(rates)]
    assert [step[1] for step in seen] == [(rate, 0.0) for rate in rates]


def _reference_validation(module):
    nll, tokens = 0.0, 0
    for batch in ToyData().val_dataloader():
        logits = module.model(batch["input_ids"]).logits.double().log_softmax(-1)[:, :-1]
        nll -= logits.gather(-1, batch["labels"][:, 1:, None]).sum().item()
        tokens += batch["labels"][:, 1:].numel()
    return nll / tokens


def test_validation_logs_mean_loss_perplexity_and_bits_per_byte(tmp_path):
    module = toy_module()
    module.bytes_per_token = 3.5
    trainer = toy_trainer(tmp_path, limit_val_batches=3)
    (metrics,) = trainer.validate(module, datamodule=ToyData(), verbose=False)
    nll = _reference_validation(module)
    assert metrics["val/loss"] == pytest.approx(nll, rel=1e-6)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert metrics["val/bits_per_byte"] == pytest.approx(nll / math.log(2) / 3.5, rel=1e-6)


def test_one_impossible_token_makes_perplexity_large_not_infinite(tmp_path):
    module = toy_module()
    with torch.no_grad():
        module.model.head.bias[5] = -200.0
    trainer = toy_trainer(tmp_path, limit_val_batches=3)
    (metrics,) = trainer.validate(module, datamodule=ToyData(), verbose=False)
    assert metrics["val/loss"] == pytest.approx(_reference_validation(module), rel=1e-6)
    assert math.isfinite(metrics["val/perplexity"])


def test_training_logs_its_figures_at_completed_steps(tmp_path):
    logger = CSVLogger(tmp_path, name="log", version="")
    trainer = toy_trainer(tmp_path, 4, logger=logger, log_every_n_steps=2, accumulate_grad_batches=2)
    module = toy_module(4)
    trainer.fit(module, datamodule=ToyData())
    lines = (tmp_path / "log/metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [row["step"] for row in rows] == ["2", "4"]
    assert [float(row["train/tokens"]) for row in rows] == [2 * 2 * 32, 4 * 2 * 32]
    assert all(float(row[f"train/{name}"]) > 0 for row in rows for name in ("loss", "lr", "tokens_per_s", "grad_norm"))


def test_the_logged_norm_is_the_one_before_clipping(tmp_path):
    norms = {}
    for clip in (None, 1e-3):
        module = toy_module(1)
        toy_trainer(tmp_path, 1, gradient_clip_val=clip).fit(module, datamodule=ToyData())
        left = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])
        norms[clip] = (module.gradient_norm().item(), left.item())
    assert norms[None][0] == norms[1e-3][0] == pytest.approx(norms[None][1])
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-3)


def test_a_compiled_network_keeps_the_names_of_its_weights(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *args, **kwargs: compiled.append(self))
    module = toy_module(1, compile=True)
    names = list(module.state_dict())
    toy_trainer(tmp_path, 1, limit_val_batches=1, val_check_interval=1).fit(module, datamodule=ToyData())
    assert compiled == [module.model]
    assert list(module.state_dict()) == names


def test_the_toy_learns(tmp_path):
    module = toy_module(60, optimizer=lambda model: adamw(model, lr=3e-2, weight_decay=0.1), schedule=constant())
    toy_trainer(tmp_path, 60).fit(module, datamodule=ToyData())
    assert module.step_loss.item() < 0.8 * math.log(23)
