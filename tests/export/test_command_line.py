"""``python -m bitnet.export`` writes what fits, says why the rest does not, and refuses in one line."""

import shutil

import pytest
import torch

from bitnet.data import TokenizerSpec
from bitnet.errors import InputError
from bitnet.export import export, exporter, load
from bitnet.export.__main__ import main
from bitnet.models import Size, from_scratch
from bitnet.nn import PackedLinear, convert


def model_158(hidden: int = 256, act: str = "silu"):
    size = Size(
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = from_scratch(body="llama" if act == "silu" else "bitnet", size=size, vocab_size=300, hidden_act=act)
    convert(model)
    return model.eval()


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a run that exported ``packed/``."""
    tokenizer = TokenizerSpec(vocab_size=300).load(lambda: ["some text to learn"], "corpus", tmp_path / "cache")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    model = model_158()
    export(model, "packed", run / "packed", tokenizer=tokenizer, record={"command": "python train.py"})
    return run, model


def answers(model):
    token_ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=token_ids).logits


def test_a_runs_folder_stands_for_its_packed_model(run_folder):
    run, model = run_folder
    loaded = load(run)
    assert loaded.format == "packed"
    assert torch.equal(answers(loaded.model), answers(model))
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("some text")).endswith("some text")


@pytest.mark.parametrize(
    "command", ["--to packed --layout t5 -o OUT", "--to hf --weights bitlinear -o OUT", "--to gguf --type TQ1_0 -o OUT"]
)
def test_what_it_writes_is_the_same_model_in_another_format(run_folder, tmp_path, capsys, command):
    run, model = run_folder
    output = tmp_path / ("out.gguf" if "gguf" in command else "out")
    main([str(run), *command.replace("OUT", str(output)).split()])
    printed = capsys.readouterr().out
    assert f"{output}: " in printed
    assert "7 layers with equal codes and scales" in printed
    loaded = load(output).model
    assert isinstance(loaded.model.layers[0].mlp.up_proj, PackedLinear)  # runs on the kernels, whatever it came from
    torch.testing.assert_close(answers(loaded), answers(model), rtol=1e-5, atol=1e-5)
    assert load(output).tokenizer.encode("some text") == load(run).tokenizer.encode("some text")


def test_by_default_it_writes_into_the_runs_folder(run_folder):
    run, _ = run_folder
    main([str(run), "--to", "hf", "--weights", "bitlinear"])
    assert (run / "hf-bitlinear" / "config.json").exists()
    main([str(run / "packed"), "--to", "packed", "--layout", "t5"])
    assert (run / "packed-packed" / "bitnet.json").exists()


def test_the_doctor_names_every_target_and_the_reasons_against_it(run_folder, capsys):
    main([str(run_folder[0]), "--check"])
    printed = capsys.readouterr().out
    for target in ("--to packed --layout t5", "--to gguf --type TQ2_0", "--to hf --weights latent", "--to gptq"):
        assert target.split(" --")[0] in printed
    assert "yes" in printed
    assert "no" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PATH"], "name a format with --to, or ask which ones fit with --check"),
        (["PATH", "--to", "packed", "--type", "TQ2_0"], "packed has no option 'type': it has layout, rest"),
        (["PATH", "--to", "packed", "--layout", "i3", "-o", "x"], "layout must be i2 or t5, got 'i3'"),
        (["nowhere", "--to", "packed"], "no model in nowhere"),
        (["PATH", "--to", "packed"], "exists already"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(run_folder, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main([str(run_folder[0]) if each == "PATH" else each for each in arguments])


def test_files_and_folders_that_hold_no_model_are_refused(tmp_path):
    (tmp_path / "text.txt").write_text("no model")
    with pytest.raises(InputError, match="is no GGUF file"):
        load(tmp_path / "text.txt")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="a run that exported nothing"):
        load(tmp_path)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(InputError, match="format must be one of packed, hf, gguf, gptq, got 'onnx'"):
        export(model_158(), "onnx", tmp_path / "out")
    with pytest.raises(InputError, match="packed has no option 'kind'"):
        exporter("packed", kind=1)


def test_an_export_from_an_export_holds_the_codes_of_the_first(run_folder, tmp_path):
    """Codes are carried over, never computed again: absmean of a ternary weight would shrink its scale by a third."""
    run, _ = run_folder
    main([str(run), "--to", "hf", "--weights", "bitlinear", "-o", str(tmp_path / "hf")])
    main([str(tmp_path / "hf"), "--to", "packed", "-o", str(tmp_path / "again")])
    layer = "model.layers.0.mlp.up_proj"
    first, again = load(run).model.get_submodule(layer), load(tmp_path / "again").model.get_submodule(layer)
    assert isinstance(again, PackedLinear)
    assert torch.equal(again.weight.packed, first.weight.packed)
    torch.testing.assert_close(again.weight.scale, first.weight.scale, rtol=3e-7, atol=0)


def test_the_record_of_the_run_goes_along(run_folder, tmp_path):
    run, _ = run_folder
    main([str(run), "--to", "packed", "--layout", "t5", "-o", str(tmp_path / "t5")])
    shutil.rmtree(run)
    assert load(tmp_path / "t5").record["command"] == "python train.py"
