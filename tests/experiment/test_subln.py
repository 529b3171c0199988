"""A run that puts SubLN into the pretrained model it starts from."""

import json

import pytest

from bitnet.experiment.run import run
from bitnet.export.packed_read import read
from bitnet.models import Size, from_scratch
from bitnet.models.subln import sub_norms


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_run_from_a_folder_fits_and_trains_the_norms(tiny, tmp_path):
    size = Size(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    from_scratch(body="llama", hidden_act="silu", size=size, vocab_size=300).save_pretrained(tmp_path / "llama")
    settings = ["size=none", f"model.path={tmp_path / 'llama'}", "model.subln=true", "export=packed"]
    records = run(tiny(*settings, "calibration.windows=4"))
    assert [record.method for record in records] == ["bitnet158 latent", "bitnet158 frozen"]
    loaded = read(tmp_path / "run" / "packed").model
    assert loaded.config.model_type == "bitnet"
    norms = sub_norms(loaded)
    assert len(norms) == 4
    assert all((norm.weight - 1).abs().max() > 0.1 for norm in norms.values())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["model"]["subln"] is True


def test_a_dry_run_needs_no_text_for_the_norms(tiny, tmp_path, capsys):
    size = Size(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    from_scratch(body="llama", hidden_act="silu", size=size, vocab_size=300).save_pretrained(tmp_path / "llama")
    run(tiny("size=none", f"model.path={tmp_path / 'llama'}", "model.subln=true", "dry_run=true"))
    assert "ffn_sub_norm (2 times)" in capsys.readouterr().out
