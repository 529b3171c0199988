"""Models trained with turned inputs or inputs in float, or stopped in their warm-up: what each format does."""

from functools import partial

import pytest
import torch

from bitnet.errors import InputError
from bitnet.export import export
from bitnet.export.doctor import TARGETS, diagnose
from bitnet.export.gguf import verify
from bitnet.export.parity import logits, token_ids
from bitnet.export.reading import load
from bitnet.models import Size, from_scratch
from bitnet.nn import BitLinear158, QuantizedLinear, bit_linears, convert, freeze
from bitnet.quant import Grid, Rotated, RotatedInputs, rotate


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch):
    monkeypatch.setattr(verify.llama_cpp, "computes", lambda file: False)


def trained(**options):
    size = Size(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = from_scratch(body="llama", size=size, vocab_size=128, hidden_act="silu").eval()
    convert(model, partial(BitLinear158.from_linear, **options))
    return model


def weights(model):
    return {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_folder_keeps_which_inputs_are_turned(tmp_path, bits):
    model = trained(activation=RotatedInputs(bits=bits))
    ids = token_ids(model)
    expected = logits(model, ids)
    done = export(model, "packed", tmp_path / "packed")
    loaded = load(tmp_path / "packed").model
    assert done.difference == 0
    assert torch.equal(logits(loaded, ids), expected)
    found = {name for name, each in loaded.named_modules() if isinstance(getattr(each, "activation", None), Rotated)}
    assert {name.split(".")[-1] for name in found} == {"o_proj", "down_proj"}
    assert len(found) == 4


@pytest.mark.parametrize("frozen", [False, True])
def test_a_dense_folder_has_the_turned_weights_turned_back(tmp_path, frozen):
    model = trained(activation=RotatedInputs())
    codes = {name: layer.quantized_weight().dequantize() for name, layer in bit_linears(model)}
    if frozen:
        freeze(model)
    export(model, "hf", tmp_path / "hf")
    found = dict(load(tmp_path / "hf").model.named_parameters())
    for name, values in codes.items():
        turned = name.endswith(("o_proj", "down_proj"))
        assert torch.equal(found[f"{name}.weight"], rotate(values) if turned else values)


@pytest.mark.parametrize(
    ("format", "said"),
    [
        ("gguf", "turned by a Hadamard matrix, which no runtime of GGUF files does: use export=packed"),
        ("gptq", "inputs"),
    ],
)
def test_formats_without_a_word_for_turned_inputs_refuse_them(tmp_path, format, said):
    with pytest.raises(InputError, match=said):
        export(trained(quantizer=Grid(4, True, 32), activation=Rotated()), format, tmp_path / "model")


@pytest.mark.parametrize(("format", "name"), [("gptq", "gptq"), ("gguf", "model.gguf")])
@pytest.mark.parametrize(("bits", "granularity"), [(4, 32), (4, "row"), (8, "row")])
def test_trained_integers_with_inputs_in_float_are_written_with_equal_codes(tmp_path, format, name, bits, granularity):
    model = trained(quantizer=Grid(bits, True, granularity), activation=None)
    expected = {name: layer.quantized_weight() for name, layer in bit_linears(model)}
    done = export(model, format, tmp_path / name)
    assert done.layers == len(expected) == 14
    found = weights(load(tmp_path / name).model)
    assert found.keys() == expected.keys()
    for layer, weight in expected.items():
        assert torch.equal(found[layer].dequantize(), weight.dequantize())


def test_ternary_weights_with_inputs_in_float_are_packed_and_written_dense(tmp_path):
    model = trained(activation=None)
    ids = token_ids(model)
    for format in ("packed", "hf"):
        export(model, format, tmp_path / format)
        assert torch.equal(logits(load(tmp_path / format).model, ids), logits(model, ids))


@pytest.mark.parametrize("blend", [{"weight": 1, "input": 0.5}, {"weight": 1, "input": 1, "eight_bits": True}])
def test_no_format_takes_a_model_that_was_stopped_in_its_warm_up(tmp_path, blend):
    model = trained(activation=Rotated())
    for _, layer in bit_linears(model):
        layer.blend(**blend)
    for found in diagnose(model, targets=TARGETS):
        assert any("self_attn.q_proj and 13 more is still being warmed up" in each for each in found.problems), found
    with pytest.raises(InputError, match="train to the end of the warm-up"):
        export(model, "packed", tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_a_layer_of_its_own_warms_up_alone(tmp_path):
    model = trained()
    assert not any(found.problems for found in diagnose(model, targets=[("packed", {})]))
    model.get_submodule("model.layers.1.mlp.up_proj").blend(0.5, 1)
    problem = diagnose(model, targets=[("packed", {})])[0].problems[0]
    assert problem.startswith("the quantization of model.layers.1.mlp.up_proj is still being warmed up")
