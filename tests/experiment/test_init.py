"""A run that sets the weights of the pretrained model it starts from."""

import pytest
import torch

from bitnet.errors import InputError
from bitnet.experiment import initial
from bitnet.experiment.run import run
from bitnet.models import Size, from_scratch

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


@pytest.fixture
def pretrained(tmp_path):
    size = Size(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    from_scratch(body="llama", hidden_act="silu", size=size, vocab_size=300).save_pretrained(tmp_path / "llama")
    return ["size=none", f"model.path={tmp_path / 'llama'}", "calibration.windows=4", "export=packed"]


@pytest.mark.parametrize("init", ["mse", "gptq", "hessian", "billm"])
def test_a_run_begins_with_the_weights_that_were_found(tiny, pretrained, tmp_path, capsys, init):
    records = run(tiny(*pretrained, f"init={init}", "fit=false"))
    plain = run(tiny(*pretrained, "fit=false", f"output_dir={tmp_path / 'plain'}"))
    assert records[-1].method == "bitnet158 frozen"
    assert records[-1].nll != plain[-1].nll
    assert "14 layers in" in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_does_not_initialise_again_and_ends_in_the_same_bits(tiny, pretrained, tmp_path, monkeypatch):
    run(tiny(*pretrained, "init=hessian", f"output_dir={tmp_path / 'whole'}"))
    stopping = tiny(*pretrained, "init=hessian")
    monkeypatch.setattr("bitnet.experiment.run.Measure", _stop)
    with pytest.raises(KeyboardInterrupt):
        run(stopping)
    monkeypatch.undo()
    monkeypatch.setattr(initial, "initialise", _stop)  # it would be noticed
    (tmp_path / "run" / "checkpoints" / "last.ckpt").stat()
    run(tiny(f"resume={tmp_path / 'run'}"))
    states = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "run")]
    assert all(torch.equal(states[0]["state_dict"][key], value) for key, value in states[1]["state_dict"].items())


def _stop(*arguments, **named):
    raise KeyboardInterrupt


def test_a_twin_starts_from_the_pretrained_weights(tiny, pretrained, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(initial, "initialise", lambda *arguments, **named: calls.append(0) or [])
    run(tiny(*pretrained, "init=mse", "twin=dense", "trainer.max_steps=2"))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init=mse"], r"init= starts from the weights of a pretrained model: give model.path=DIR"),
        (["init=mse", "model=hf", "model.path=DIR"], r"init= sets the weights of layers that are quantized"),
        (["init=mse", "model.path=DIR", "quantizer=int4", "quantizer.range=mse"], r"set quantizer.range=minmax"),
        (["init=gptq", "model.path=DIR", "init.damping=3"], r"init.damping must be above 0"),
        (["init=mse", "model.path=DIR", "activation=a4_rotated"], r"take activation=a4, or init=none"),
        (["init=gptq", "model.path=DIR", "+init.extra=3"], r"unknown key init.extra"),
    ],
)
def test_an_initialisation_that_does_not_fit_is_refused_before_any_work(tiny, overrides, message):
    with pytest.raises(InputError, match=message):
        run(tiny("size=none" if "model.path=DIR" in overrides else "size=nano", *overrides))
