"""A trained model goes in; its quantized form, beside it, comes out as two records, and a stop changes nothing."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from bitnet.errors import InputError
from bitnet.experiment import post_training
from bitnet.experiment.run import run
from bitnet.experiment.settings import resumed
from bitnet.models import from_directory
from bitnet.report import RunRecord


@pytest.fixture
def quantizing(tiny: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., DictConfig]:
    """Settings that quantize a tiny pretrained model; its training takes a few seconds."""
    run(tiny("model=dense", f"output_dir={tmp_path / 'trained'}"))
    hf = tmp_path / "trained" / "hf"

    def configure(*overrides: str) -> DictConfig:
        fixed = ["fit=false", "model=hf", f"model.path={hf}", f"data.tokenizer.path={hf}", "export=none"]
        few = ["calibration.windows=6", "calibration.documents=40"]
        if "evaluation=blocks" not in overrides:
            few += ["evaluation.window=8", "evaluation.bootstrap=50"]
        given = {each.split("=")[0] for each in overrides}
        return tiny(*(each for each in fixed + few if each.split("=")[0] not in given), *overrides)

    return configure


def test_a_run_records_the_original_and_the_quantized_model_on_the_same_tokens(quantizing, tmp_path):
    original, quantized = run(quantizing("ptq=gptq", "ptq.bits=3"))
    folder = tmp_path / "run"
    assert RunRecord.read(folder / "reference.json") == original
    assert RunRecord.read(folder / "run.json") == quantized
    assert (original.method, quantized.method) == ("full precision", "gptq")
    assert original.evaluation == quantized.evaluation
    assert quantized.gap == pytest.approx(quantized.nll - original.nll, abs=1e-9)
    assert quantized.gap_interval[0] <= quantized.gap <= quantized.gap_interval[1]
    assert quantized.kl > 0
    assert 0 < quantized.top1_agreement <= 1
    assert quantized.claimed_bits == 3 < quantized.bits_per_weight < 4.5
    assert quantized.bytes < original.bytes
    assert quantized.calibration["windows"] == 6
    names = {path.name for path in folder.iterdir()}
    assert {"layers.csv", "layers.md", "layers.png", "results.md", "config.yaml"} <= names
    assert post_training.UNFINISHED not in names
    with (folder / "layers.csv").open(encoding="utf-8") as lines:
        assert len(list(csv.DictReader(lines))) == 14


@pytest.mark.parametrize(
    "overrides",
    [
        ["ptq=absmax", "activation=absmax", "logger=tensorboard"],
        ["ptq=zeropoint", "activation=static", "activation.range=mse", "driver.smoothquant=0.5"],
        ["ptq=hqq", "driver.layer_errors=false", "driver.embeddings=true"],
        ["ptq=gptq_refined", "ptq.granularity=16", "driver.head=true"],
        ["ptq=kquant", "ptq.bits=2", "evaluation=blocks"],
        ["ptq=absmax", "evaluation.compare=false", "driver.layer_errors=false"],
    ],
)
def test_methods_activations_and_protocols_go_together(quantizing, overrides):
    original, quantized = run(quantizing(*overrides))
    assert quantized.evaluation == original.evaluation
    assert 0 < quantized.nll < original.nll + 2


def test_a_model_is_quantized_after_a_training_too(tiny):
    original, quantized = run(tiny("model=dense", "ptq=absmax", "ptq.bits=8", "export=none", "calibration.windows=4"))
    assert original.steps == quantized.steps == 6
    assert abs(quantized.gap) < 0.05


def test_a_run_that_was_stopped_ends_with_the_same_record(quantizing, tmp_path, monkeypatch):
    _, expected = run(quantizing("ptq=gptq", f"output_dir={tmp_path / 'whole'}"))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    settings = quantizing("ptq=gptq")
    with monkeypatch.context() as patched:
        patched.setattr(post_training, "_write_layers", stop)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    assert list((tmp_path / "run" / post_training.UNFINISHED).glob("block_*"))
    settings.resume = str(tmp_path / "run")
    _, again = run(resumed(settings))
    for name in ("nll", "gap", "kl", "bits_per_weight", "bytes", "calibration"):
        assert getattr(again, name) == getattr(expected, name)


def test_the_exported_folder_holds_the_quantized_values(quantizing, tmp_path):
    _, quantized = run(quantizing("ptq=absmax", "ptq.bits=4", "ptq.granularity=row", "export=hf"))
    weight = from_directory(tmp_path / "run" / "hf").model.layers[0].self_attn.q_proj.weight
    assert all(len(row.unique()) <= 15 for row in weight)
    assert quantized.bits_per_weight < 6


def test_too_little_calibration_text_is_refused_and_leaves_nothing(quantizing, tmp_path):
    with pytest.raises(InputError, match=r"expected at least one window of 40000 tokens.*calibration.documents"):
        run(quantizing("ptq=gptq", "calibration.window=40000"))
    assert not (tmp_path / "run").exists()
