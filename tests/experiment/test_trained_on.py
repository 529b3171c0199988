"""A pretrained model that is trained on is measured beside what it was: the scale that post-training methods have."""

import pytest

from bitnet.experiment.run import run
from bitnet.report import RunRecord


@pytest.fixture
def started_from(tiny, tmp_path):
    """Settings that train on the model of a folder and measure it on text."""
    run(tiny("model=dense", "export=hf", "trainer.max_steps=2", f"output_dir={tmp_path / 'first'}"))
    folder = tmp_path / "first" / "hf"
    text = ["evaluation=text", "evaluation.window=4", "evaluation.bootstrap=50"]
    return [f"model.path={folder}", f"data.tokenizer.path={folder}", *text]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_quantized_model_has_its_gap_to_the_one_it_began_as(tiny, started_from, tmp_path):
    original, latent, frozen = run(tiny("size=none", *started_from, "export=none"))
    assert [each.method for each in (original, latent, frozen)] == [
        "full precision",
        "bitnet158 latent",
        "bitnet158 frozen",
    ]
    assert frozen.nll == latent.nll
    assert frozen.gap == pytest.approx(frozen.nll - original.nll, abs=1e-9)
    assert frozen.gap_interval[0] <= frozen.gap <= frozen.gap_interval[1]
    assert frozen.kl > 0
    assert 0 < frozen.quantized_share < 1
    assert (original.train_tokens, original.steps) == (0, 0)
    assert frozen.steps > 0
    assert RunRecord.read(tmp_path / "run" / "reference.json") == original


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_the_dense_control_has_its_gap_as_well(tiny, started_from):
    original, control = run(tiny("model=hf", *started_from, "export=none"))
    assert control.gap == pytest.approx(control.nll - original.nll, abs=1e-9)
    assert control.quantized_share == 0


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_the_comparison_can_be_left_out(tiny, started_from, tmp_path):
    records = run(tiny("size=none", *started_from, "export=none", "evaluation.compare=false"))
    assert [each.method for each in records] == ["bitnet158 latent", "bitnet158 frozen"]
    assert not (tmp_path / "run" / "reference.json").exists()


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_latent_weights_to_start_from_are_said_to_be_no_full_precision_model(tiny, tmp_path, capsys):
    first = tmp_path / "first"
    run(tiny("export=hf", "trainer.max_steps=2", f"output_dir={first}"))
    assert "latent weights of" not in capsys.readouterr().out
    run(tiny("size=none", f"model.path={first / 'hf'}", f"data.tokenizer.path={first / 'hf'}", "export=none"))
    assert "is no full-precision model" in " ".join(capsys.readouterr().out.split())
