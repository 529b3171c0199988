"""A run that trains adapters, from a folder to a record and a folder; and the runs that cannot."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bitnet.errors import InputError
from bitnet.experiment.run import run
from bitnet.experiment.settings import check


@pytest.fixture
def trained(tiny, tmp_path):
    """The folder of a dense model, its tokenizer in it."""
    run(tiny("model=dense", "export=hf", "trainer.max_steps=2", f"output_dir={tmp_path / 'dense'}"))
    return tmp_path / "dense" / "hf"


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_adapters_end_as_one_quantized_matrix_in_every_export(tiny, trained, tmp_path, capsys):
    start = ["size=none", f"model.path={trained}", f"data.tokenizer.path={trained}", "lora=latent", "lora.rank=4"]
    run(tiny(*start, "dry_run=true"))
    assert "with adapters of rank 4" in " ".join(capsys.readouterr().out.split())
    records = run(tiny(*start, "model.gradient_checkpointing=true", "optim=adafactor", "optim.lr=0.05"))
    assert [record.method for record in records] == ["bitnet158 latent", "bitnet158 frozen"]
    assert records[0].perplexity == records[1].perplexity
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "run" / "hf"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert any("q_proj" in name for name in changed)
    assert not any("embed" in name or "lm_head" in name for name in changed)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["lora"]["rank"] == 4
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any("original" in name or "embed" in name for name in checkpoint["state_dict"])


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_resumed_run_makes_the_frozen_weights_again_an_initialisation_too(tiny, trained, tmp_path):
    start = ["size=none", f"model.path={trained}", f"data.tokenizer.path={trained}", "export=none"]
    first = run(tiny(*start, "lora=latent", "lora.rank=4", "init=mse"))[-1]
    for name in ("run.json", "latent.json"):  # as if it had been stopped after its last checkpoint
        (tmp_path / "run" / name).unlink()
    again = run(tiny(f"resume={tmp_path / 'run'}"))[-1]
    assert (again.perplexity, again.steps) == (first.perplexity, first.steps)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora=latent"], r"adapts a pretrained model: give model.path=DIR"),
        (["lora=latent", "model=dense", "model.path=x"], "model=dense quantizes nothing in training: lora= goes with"),
        (["lora=latent", "model.path=x", "twin=dense"], "run model=dense by itself"),
        (["lora=latent", "model.path=x", "fit=false"], "lora= is a part of training"),
        (["lora=latent", "model.path=x", "lora.rank=0"], "lora.rank must be a positive whole number"),
        (["model.gradient_checkpointing=true", "compile=true"], "goes with compile=false"),
        (["model.gradient_checkpointing=true", "model.path=x", "fit=false"], "gradient_checkpointing=true is a part"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tiny, overrides, message):
    with pytest.raises(InputError, match=message):
        check(tiny(*overrides))
