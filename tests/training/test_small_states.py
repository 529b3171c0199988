"""Optimizers with 8-bit and factored states: groups, learning, memory, and runs that resume to the same bits."""

import math
from functools import cache, partial

import pytest
import torch
from toy_training import ToyData, ToyLanguageModel, toy_module, toy_trainer

from bitnet import BitLinear158
from bitnet.errors import InputError
from bitnet.quant import LSQ
from bitnet.training import LastAndBest, adafactor, adamw, adamw8bit, small_states, two_stage

STEPS = 12
OPTIMIZERS = {
    "adamw8bit": partial(adamw8bit, lr=1e-2, weight_decay=0.1, min_8bit_size=0),
    "adafactor": partial(adafactor, lr=1e-2, weight_decay=0.1),
}


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def _run(root, make, *, until=STEPS, resume=None):
    torch.manual_seed(3)
    module = toy_module(STEPS, model=ToyLanguageModel(dropout=0.2), optimizer=make, schedule=two_stage(warmup=2))
    trainer = toy_trainer(
        root, until, [LastAndBest()], enable_checkpointing=True, val_check_interval=6, limit_val_batches=3
    )
    torch.manual_seed(99)
    trainer.fit(module, datamodule=ToyData(), ckpt_path=resume)
    return trainer, module


def _tensors(value):
    """Every tensor and number of a nested state, in order."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in _tensors(value[key])]
    return [torch.as_tensor(value)]


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, make, stop):
    trainer, module = _run(tmp_path / "straight", make)
    _run(tmp_path / "stopped", make, until=stop)
    resumed, other = _run(tmp_path / "stopped", make, resume=tmp_path / "stopped/checkpoints/last.ckpt")
    for (name, weight), (_, theirs) in zip(module.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(weight, theirs), name
    states = [_tensors(each.optimizers[0].state_dict()["state"]) for each in (trainer, resumed)]
    assert len(states[0]) == len(states[1]) > 6
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_groups_decay_and_learn_as_those_of_adamw(make):
    def settings(optimizer_of):
        model = ToyLanguageModel()
        model.up = BitLinear158.from_linear(model.up, quantizer=LSQ(4))
        optimizer = optimizer_of(model, lr=1e-3, weight_decay=0.3, scale_lr=0.25)
        found = {
            id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
        }
        return {name: found[id(p)] for name, p in model.named_parameters()}

    assert settings(make.func) == settings(adamw)


def test_the_schedule_reaches_the_step(tmp_path, make):
    """At a learning rate of zero nothing moves; bitsandbytes and Adafactor take it from the group in each step."""
    torch.manual_seed(0)
    model = ToyLanguageModel()
    optimizer = make(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.clone() for p in model.parameters()]
    model(torch.arange(16).reshape(2, 8)).logits.square().mean().backward()
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


@pytest.fixture(scope="module")
def learnt():
    """The loss after 150 steps as a function of the optimizer: every second token follows from the one before."""

    def loss(make):
        torch.manual_seed(7)
        model, data = ToyLanguageModel(), iter(ToyData(150).train_dataloader())
        optimizer, losses = make(model), []
        for batch in data:
            ids = batch["input_ids"]
            loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses[-20:]) / 20

    return cache(loss)


def test_they_learn_what_adamw_learns(learnt, make):
    reference = learnt(partial(adamw, lr=1e-2, weight_decay=0.1))
    assert reference < 0.8 * math.log(23)
    assert learnt(make) == pytest.approx(reference, abs=0.1)


@pytest.mark.parametrize(("name", "most"), [("adamw8bit", 2.1), ("adafactor", 0.05)])
def test_states_take_the_bytes_that_are_claimed(name, most):
    layer = torch.nn.Linear(512, 768, bias=False)
    optimizer = OPTIMIZERS[name](layer)
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    (state,) = optimizer.state.values()
    shared = {"qmap1", "qmap2"}  # one table for all tensors
    kept = sum(each.nbytes for key, each in state.items() if isinstance(each, torch.Tensor) and key not in shared)
    assert kept / layer.weight.numel() < most


def test_without_bitsandbytes_the_refusal_says_what_to_install(monkeypatch):
    monkeypatch.setattr(small_states, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs bitsandbytes, which is not installed: pip install"):
        adamw8bit(ToyLanguageModel(), lr=1e-3, weight_decay=0.1)


def test_half_precision_weights_are_refused(make):
    with pytest.raises(InputError, match=r"trainable weights must be float32, got torch.bfloat16"):
        make(ToyLanguageModel().bfloat16())


@pytest.mark.parametrize("value", [-1, 2.5, True])
def test_a_size_that_is_no_number_of_weights_is_refused(value):
    with pytest.raises(InputError, match="min_8bit_size must be a whole number"):
        adamw8bit(ToyLanguageModel(), lr=1e-3, weight_decay=0.1, min_8bit_size=value)


@pytest.mark.parametrize("options", [{"decay_rate": 0.8}, {"decay_rate": -2}, {"clip_threshold": 0}])
def test_options_of_adafactor_outside_their_range_are_refused(options):
    with pytest.raises(InputError, match=f"optim.{next(iter(options))} must"):
        adafactor(ToyLanguageModel(), lr=1e-3, weight_decay=0.1, **options)
