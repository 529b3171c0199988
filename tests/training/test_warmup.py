"""The warm-up of the quantization: shares by the step alone, models as they are at their step, exact resumes."""

import csv
import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from toy_training import ToyData, ToyLanguageModel, toy_module, toy_trainer

from bitnet.errors import InputError
from bitnet.nn import bit_linears, freeze
from bitnet.quant import Rotated
from bitnet.training import LastAndBest, QuantizationWarmup, WarmUp
from bitnet.training.warmup import SHAPES

STEPS = 12


def test_linear_is_the_published_formula():
    warmup = WarmUp("linear", weight=[0, 1000], input=[0, 1000])
    for step in (0, 1, 250, 999, 1000, 5000):
        assert warmup(step, 10_000) == (min(step / 1000, 1),) * 2


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_rises_from_0_to_1_and_is_half_way_at_half_time(shape):
    warmup = WarmUp(shape, weight=[10, 30], input=[0, 0])
    shares = [warmup(step, 100).weight for step in range(40)]
    assert shares[:11] == [0.0] * 11
    assert shares[30:] == [1.0] * 10
    assert shares == sorted(shares)
    assert len(set(shares[10:31])) == 21
    assert shares[20] == pytest.approx(0.5)
    assert shares[13] + shares[27] == pytest.approx(1)


def test_cosine_and_sigmoid_are_the_curves_of_their_names():
    cosine, sigmoid = (WarmUp(shape, weight=[0, 100])(25, 1000).weight for shape in ("cosine", "sigmoid"))
    assert cosine == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    low, value = 1 / (1 + math.exp(6)), 1 / (1 + math.exp(3))
    assert sigmoid == pytest.approx((value - low) / (1 - 2 * low))


def test_a_share_of_the_run_is_as_many_steps():
    warmup = WarmUp("linear", weight=[0, 0.1], input=[0.1, 0.2])
    assert warmup(20, 400) == (0.5, 0.0)
    assert warmup(60, 400) == (1.0, 0.5)
    assert warmup(80, 400) == (1.0, 1.0)


def test_a_warm_up_without_length_is_a_switch():
    warmup = WarmUp(weight=[0, 0], input=[3, 3])
    assert [warmup(step, 9) for step in (0, 2, 3)] == [(1, 0), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: WarmUp("quadratic"), "warmup.shape must be one of linear, cosine, sigmoid, got 'quadratic'"),
        (lambda: WarmUp(weight=[0.2]), r"warmup.weight must be where it begins and where it ends"),
        (lambda: WarmUp(weight=0.2), r"warmup.weight must be where it begins .* such as \[0, 0.2\].* got 0.2"),  # pyright: ignore
        (lambda: WarmUp(input=None), r"warmup.input must be where it begins .* got None"),  # pyright: ignore
        (lambda: WarmUp(input="05"), r"warmup.input must be where it begins .* got '05'"),  # pyright: ignore
        (lambda: WarmUp(input=[0, 10.5]), r"warmup.input must be .* got \[0, 10.5\]"),
        (lambda: WarmUp(input=[-1, 5]), "warmup.input must be"),
        (lambda: WarmUp(weight=[0, float("nan")]), "warmup.weight must be"),
        (lambda: WarmUp(weight=[0.5, 0.2]).check(100), "must end after it begins, got steps 50 to 20"),
        (lambda: WarmUp(weight=[0, 1000]).check(1000), "before the last of the run's 1000 steps.*ends at step 1000"),
        (lambda: QuantizationWarmup(WarmUp(input=[0, 12]), 12), "warmup.input ends at step 12"),
        (lambda: WarmUp(narrow=0), "warmup.narrow must be when the inputs go from 8 bits to fewer.* got 0"),
        (lambda: WarmUp(narrow=1.5), "warmup.narrow must be .* got 1.5"),
        (lambda: WarmUp(input=[0, 50], narrow=40).check(100), "warmup.input ends at step 50.* got step 40"),
        (lambda: WarmUp(narrow=100).check(100), "before the last of the run's 100 steps, got step 100"),
    ],
)
def test_a_warm_up_that_cannot_be_is_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_a_warm_up_may_end_with_the_last_step_quantized():
    warmup = WarmUp(weight=[0, 99], input=[0, 99])
    warmup.check(100)
    assert warmup(99, 100) == (1, 1)


def test_inputs_have_8_bits_until_they_are_narrowed_in_one_step():
    warmup = WarmUp(narrow=0.75)
    warmup.check(12)
    assert [warmup.eight_bits(step, 12) for step in range(12)] == [True] * 9 + [False] * 3
    assert not WarmUp().eight_bits(0, 12)


def _run(root, *, until=STEPS, resume=None, extra=(), warmup=None, activation=None):
    torch.manual_seed(3)
    module = toy_module(STEPS, model=ToyLanguageModel(dropout=0.2))
    for _, layer in bit_linears(module.model):
        layer.activation = activation or layer.activation
    warmup = QuantizationWarmup(warmup or WarmUp(weight=[0, 6], input=[2, 8]), STEPS)
    trainer = toy_trainer(
        root,
        until,
        [warmup, LastAndBest(), *extra],
        enable_checkpointing=True,
        accumulate_grad_batches=2,
        val_check_interval=6,
        limit_val_batches=3,
        logger=CSVLogger(root),
        log_every_n_steps=1,
    )
    torch.manual_seed(99)
    trainer.fit(module, datamodule=ToyData(10_000), ckpt_path=resume)
    return trainer, module


@pytest.mark.parametrize("stop", [1, 3, 5, 6, 7])  # before, in and after the warm-up; gradients accumulate over two
def test_a_run_resumed_in_its_warm_up_ends_in_the_same_bits(tmp_path, stop):
    _, straight = _run(tmp_path / "straight")
    _run(tmp_path / "stopped", until=stop)
    _, resumed = _run(tmp_path / "stopped", resume=tmp_path / "stopped/checkpoints/last.ckpt")
    for (name, weight), other in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


STAGES = WarmUp(weight=[0, 2], input=[1, 3], narrow=8)


@pytest.mark.parametrize("stop", [2, 5, 8, 9])  # in the warm-up, with 8 bits, at their end, after it
def test_a_run_resumed_before_its_inputs_are_narrowed_ends_in_the_same_bits(tmp_path, stop):
    options = {"warmup": STAGES, "activation": Rotated()}
    _, straight = _run(tmp_path / "straight", **options)
    _run(tmp_path / "stopped", until=stop, **options)
    _, resumed = _run(tmp_path / "stopped", resume=tmp_path / "stopped/checkpoints/last.ckpt", **options)
    for (name, weight), other in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


def test_a_run_stopped_with_8_bit_inputs_is_not_frozen_and_has_no_best_checkpoint(tmp_path):
    _, module = _run(tmp_path, until=7, warmup=STAGES, activation=Rotated())
    assert all(layer.present_activation == Rotated(8) for _, layer in bit_linears(module))
    assert not (tmp_path / "checkpoints/best.ckpt").exists()
    with pytest.raises(InputError, match="still being warmed up"):
        freeze(module.model)
    _, module = _run(tmp_path / "whole", warmup=STAGES, activation=Rotated())
    assert all(layer.present_activation == Rotated() for _, layer in bit_linears(module))
    freeze(module.model)
    rows = csv.DictReader(next((tmp_path / "whole").rglob("metrics.csv")).read_text().splitlines())
    found = [float(row["train/eight_bit_inputs"]) for row in rows if row.get("train/eight_bit_inputs")]
    assert found == [1.0] * 8 + [0.0] * 4


def test_inputs_that_end_in_8_bits_cannot_be_narrowed(tmp_path):
    with pytest.raises(InputError, match="only where they end in fewer"):
        _run(tmp_path, warmup=STAGES)


def test_after_the_warm_up_the_model_freezes_to_the_same_bits(tmp_path):
    _, module = _run(tmp_path)
    ids = torch.randint(0, 8, (2, 7))
    module.eval()
    trained = module.model(ids).logits
    freeze(module.model)
    assert torch.equal(module.model(ids).logits, trained)


def test_a_run_stopped_in_its_warm_up_is_not_frozen(tmp_path):
    _, module = _run(tmp_path, until=3)
    assert all(layer.blending.tolist() == pytest.approx([0.5, 1 / 6]) for _, layer in bit_linears(module))
    with pytest.raises(InputError, match="still being warmed up"):
        freeze(module.model)


def test_the_shares_are_logged_at_every_step(tmp_path):
    _run(tmp_path)
    path = next(tmp_path.rglob("metrics.csv"))
    rows = [row for row in csv.DictReader(path.read_text().splitlines()) if row.get("train/quantized_weight")]
    found = [float(row["train/quantized_weight"]) for row in rows]
    assert found == pytest.approx([min(step / 6, 1) for step in range(STEPS)])


def test_a_checkpoint_of_the_warm_up_is_not_the_best_one(tmp_path):
    _run(tmp_path, until=4)
    assert not (tmp_path / "checkpoints/best.ckpt").exists()
    _run(tmp_path / "whole")
    assert (tmp_path / "whole/checkpoints/best.ckpt").exists()


def test_a_model_with_nothing_quantized_has_nothing_to_warm_up(tmp_path):
    module = toy_module(STEPS)
    for name, layer in bit_linears(module.model):
        module.model.set_submodule(name, nn.Linear(layer.in_features, layer.out_features, bias=False))
    warmup = QuantizationWarmup(WarmUp(weight=[0, 6], input=[0, 6]), STEPS)
    with pytest.raises(InputError, match="no BitLinear"):
        toy_trainer(tmp_path, STEPS, [warmup]).fit(module, datamodule=ToyData(100))


def test_an_optimizer_that_begins_anew_has_seen_the_quantized_steps_alone(tmp_path):
    kept, _ = _run(tmp_path / "kept")
    anew, _ = _run(tmp_path / "anew", warmup=ANEW)
    assert _counted(kept) == {STEPS}
    assert _counted(anew) == {STEPS - 8}


@pytest.mark.parametrize("stop", [7, 8, 9])  # before it begins anew, at that step, after it
def test_a_run_resumed_around_a_new_beginning_of_the_optimizer_ends_in_the_same_bits(tmp_path, stop):
    _, straight = _run(tmp_path / "straight", warmup=ANEW)
    _run(tmp_path / "stopped", until=stop, warmup=ANEW)
    _, resumed = _run(tmp_path / "stopped", resume=tmp_path / "stopped/checkpoints/last.ckpt", warmup=ANEW)
    for (name, weight), other in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


ANEW = WarmUp(weight=[0, 6], input=[2, 8], reset_optimizer=True)


def _counted(trainer):
    """How many steps the moments of each parameter have seen."""
    return {int(state["step"]) for state in trainer.optimizers[0].state.values()}
