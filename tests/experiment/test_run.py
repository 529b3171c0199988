"""One command gives one folder with everything in it, and going on after a stop changes no bit of it."""

import json
from pathlib import Path

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitnet.errors import InputError
from bitnet.experiment import run as experiment
from bitnet.experiment import settings
from bitnet.experiment.run import run
from bitnet.experiment.settings import resumed
from bitnet.export import load
from bitnet.models import from_directory
from bitnet.nn import PackedLinear, QuantizedLinear
from bitnet.quant import absmean_int4
from bitnet.report import RunRecord


def test_a_run_leaves_its_record_checkpoint_curves_and_hugging_face_folder(tiny, tmp_path):
    latent, frozen = run(tiny())
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "latent.json", "results.md", "curves.png", "config.yaml", "checkpoints", "csv", "hf"} <= found
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert RunRecord.read(tmp_path / "run" / "run.json") == frozen
    assert (latent.method, frozen.method) == ("bitnet158 latent", "bitnet158 frozen")
    assert (frozen.steps, frozen.train_tokens, frozen.seed) == (6, 6 * 2 * 32, 0)
    assert frozen.data["corpus_hash"]


def test_the_frozen_model_has_the_loss_of_the_trained_one_to_the_last_bit(tiny):
    latent, frozen = run(tiny("export=none"))
    assert frozen.nll == latent.nll
    assert latent.bits_per_weight == 32
    assert 1.6 < frozen.bits_per_weight < 2.2  # tiny layers: the last byte of a row and the scale weigh more
    assert frozen.bytes < latent.bytes


def test_transformers_loads_the_exported_folder_alone(tiny, tmp_path):
    run(tiny())
    folder = tmp_path / "run" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Document 7 says", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "Document 7 says"
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "bitnet"
    with torch.compiler.set_stance("force_eager"):
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert torch.isfinite(logits).all()


def test_an_exported_folder_is_evaluated_to_the_loss_it_had(tiny, tmp_path):
    _, frozen = run(tiny())
    hf, again = tmp_path / "run" / "hf", tmp_path / "again"
    _, evaluated = run(
        tiny("fit=false", f"model.path={hf}", f"data.tokenizer.path={hf}", f"output_dir={again}", "export=none")
    )
    assert evaluated.nll == frozen.nll
    assert evaluated.steps == 0


@pytest.mark.parametrize("choice", ["model=bitnet1", "model=dense", "model.body=llama model.hidden_act=silu"])
def test_every_model_trains_and_is_exported(tiny, tmp_path, choice):
    records = run(tiny(*choice.split()))
    assert len(records) == (1 if choice == "model=dense" else 2)
    assert from_directory(tmp_path / "run" / "hf").config.hidden_size == 32


@pytest.mark.parametrize("granularity", ["row", "16"])
def test_every_granularity_trains_freezes_exactly_and_is_exported(tiny, granularity):
    latent, frozen = run(tiny(f"quantizer.granularity={granularity}"))
    assert frozen.nll == latent.nll


@pytest.mark.parametrize("quantizer", ["lsq", "seq", "int4", "int8"])
def test_every_quantizer_trains_freezes_exactly_and_is_packed(tiny, tmp_path, quantizer):
    latent, frozen = run(tiny(f"quantizer={quantizer}", "export=packed", "warmup=staged"))
    assert frozen.nll == latent.nll
    loaded = load(tmp_path / "run" / "packed").model
    counted = [layer for layer in loaded.modules() if isinstance(layer, QuantizedLinear)]
    assert {layer.weight.levels for layer in counted} == {{"lsq": 16, "seq": 4, "int4": 15, "int8": 255}[quantizer]}


def test_four_bit_inputs_train_freeze_exactly_and_are_packed(tiny, tmp_path):
    latent, frozen = run(tiny("activation=a4", "export=packed"))
    assert frozen.nll == latent.nll
    loaded = load(tmp_path / "run" / "packed").model
    packed = [layer for layer in loaded.modules() if isinstance(layer, PackedLinear)]
    assert packed
    assert all(layer.activation.func is absmean_int4 for layer in packed)


def test_a_twin_is_trained_on_the_same_tokens_and_gives_the_gap(tiny, tmp_path, capsys):
    dense, _, frozen = run(tiny("twin=dense", "twin_lr=1e-3"))
    assert (dense.method, dense.bits_per_weight) == ("dense", 32)
    assert dense.data == frozen.data
    assert dense.train_tokens == frozen.train_tokens
    assert dense.config["optim"]["lr"] == 1e-3
    assert f"{frozen.nll - dense.nll:+.4f}" in (tmp_path / "run" / "results.md").read_text()
    assert f"{frozen.nll - dense.nll:+.4f}" in capsys.readouterr().out


class _StopAfter(Callback):
    """Ends the process's training as Ctrl-C does, after an optimizer step in the middle of an epoch."""

    def __init__(self, steps: int, save: bool) -> None:
        self.steps, self.save = steps, save

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.steps:
            if self.save:
                trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
            raise KeyboardInterrupt


def _with(made, callback):
    """``callback`` before the callbacks of a run; loggers are left as they are."""
    return {"first": callback, **made} if "guard" in made else made


@pytest.mark.parametrize("twin", ["null", "dense"])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tiny, tmp_path, monkeypatch, twin):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    records = run(tiny(f"twin={twin}", f"output_dir={straight}"))
    original = experiment.build_all
    monkeypatch.setattr(experiment, "build_all", lambda nodes: _with(original(nodes), _StopAfter(3, save=True)))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tiny(f"twin={twin}", f"output_dir={stopped}"))
    monkeypatch.setattr(experiment, "build_all", original)
    resumed = run(tiny(f"resume={stopped}"))
    assert [record.nll for record in resumed] == [record.nll for record in records]
    expected, got = (load_file(folder / "hf" / "model.safetensors") for folder in (straight, stopped))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_finished_run_resumes_to_its_record(tiny, tmp_path):
    records = run(tiny())
    assert run(tiny(f"resume={tmp_path / 'run'}")) == records


def test_a_finished_run_is_exported_again_by_resuming_it(tiny, tmp_path, monkeypatch):
    records = run(tiny("export=none"))
    given = [f"resume={tmp_path / 'run'}", "export=packed", "export.packed.layout=t5"]
    monkeypatch.setattr(settings, "_overrides", lambda: given)
    again = run(tiny(*given))
    assert [record.nll for record in again] == [record.nll for record in records]
    assert '"t5"' in (tmp_path / "run" / "packed" / "bitnet.json").read_text()


def test_a_run_that_stopped_after_its_export_is_finished_by_resuming(tiny, tmp_path):
    records = run(tiny())
    (tmp_path / "run" / "run.json").unlink()
    again = run(tiny(f"resume={tmp_path / 'run'}"))
    assert [record.nll for record in again] == [record.nll for record in records]
    assert again[-1].tokens_per_s is None  # this process trained nothing


def test_a_run_too_short_to_log_or_validate_still_ends_with_its_table(tiny, tmp_path):
    run(tiny("trainer.max_steps=2", "trainer.log_every_n_steps=50", "trainer.val_check_interval=50"))
    assert "bitnet158 frozen" in (tmp_path / "run" / "results.md").read_text()


def test_validation_in_the_middle_of_an_accumulation_does_not_change_the_resumed_bits(tiny, tmp_path, monkeypatch):
    overrides = ["trainer.accumulate_grad_batches=3", "trainer.val_check_interval=2", "export=none"]
    records = run(tiny(f"output_dir={tmp_path / 'straight'}", *overrides))
    original = experiment.build_all
    monkeypatch.setattr(experiment, "build_all", lambda nodes: _with(original(nodes), _StopAfter(4, save=False)))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tiny(f"output_dir={tmp_path / 'stopped'}", *overrides))
    monkeypatch.setattr(experiment, "build_all", original)
    assert run(tiny(f"resume={tmp_path / 'stopped'}"))[-1].nll == records[-1].nll


def test_resuming_keeps_the_number_of_threads_and_takes_no_other_settings(tiny, tmp_path, monkeypatch):
    run(tiny("threads=1", "export=none"))
    assert resumed(tiny(f"resume={tmp_path / 'run'}")).threads == 1
    monkeypatch.setattr("bitnet.experiment.settings._overrides", lambda: ["resume=x", "optim.lr=1"])
    with pytest.raises(InputError, match=r"optim\.lr=1 has no meaning"):
        resumed(tiny(f"resume={tmp_path / 'run'}"))


def test_weights_that_were_exported_as_floats_are_not_quantized_again(tiny, tmp_path):
    _, frozen = run(tiny("quantizer.granularity=row"))
    hf = tmp_path / "run" / "hf"
    again = ["fit=false", f"model.path={hf}", f"data.tokenizer.path={hf}", f"output_dir={tmp_path / 'again'}"]
    with pytest.raises(InputError, match="quantizing them again would shrink their scale"):
        run(tiny(*again, "quantizer.granularity=row"))
    (dense,) = run(tiny(*again, "model=hf"))
    assert dense.nll == pytest.approx(frozen.nll, abs=0.05)  # without the rounding of the activations


class _Poison(Callback):
    """Makes a weight NaN, as a bad update would, when three steps are done."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 3:
            with torch.no_grad():
                next(pl_module.parameters()).fill_(float("nan"))


def test_a_diverging_run_keeps_its_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    original = experiment.build_all
    monkeypatch.setattr(experiment, "build_all", lambda nodes: _with(original(nodes), _Poison()))
    with pytest.raises(InputError, match="step 3: expected a finite validation loss, got nan"):
        run(tiny("trainer.val_check_interval=1", "logger=csv"))
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in last["state_dict"].values())


def test_a_folder_that_exists_is_refused_and_left_alone(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already: choose a new output_dir"):
        run(tiny())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_run_that_is_refused_before_it_begins_leaves_no_folder(tiny, tmp_path):
    with pytest.raises(InputError):
        run(tiny("optim.lr=-1"))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_parameters_and_writes_nothing(tiny, tmp_path, capsys):
    assert run(tiny("dry_run=true", "model.vocab_size=300")) == []
    out = capsys.readouterr().out
    quantized = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert f"{quantized:,} quantized" in " ".join(out.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_refused_with_its_name(tiny, tmp_path):
    run(tiny())
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(InputError, match=r"last\.ckpt"):
        run(tiny(f"resume={tmp_path / 'run'}"))
