"""Models: every linear of a block is converted, twins start equal, a damaged or quantized folder is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bitnet
from bitnet import BitLinear158, InputError
from bitnet.models import Size, causal_lm, from_directory
from bitnet.nn import bit_linears

SIZE = Size(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
BODIES = [("bitnet", "relu2"), ("bitnet", "silu"), ("llama", "silu")]


def build(body="bitnet", hidden_act="relu2", layer=BitLinear158.from_linear, seed=0, size=SIZE, vocab_size=60):
    return causal_lm(vocab_size=vocab_size, body=body, hidden_act=hidden_act, size=size, layer=layer, seed=seed)


@pytest.mark.parametrize(("body", "hidden_act"), BODIES)
def test_no_linear_inside_a_block_stays_dense(body, hidden_act):
    model = build(body, hidden_act)
    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert dense == ["lm_head"]
    assert len(bit_linears(model)) == 7 * SIZE.num_hidden_layers


@pytest.mark.parametrize(("body", "hidden_act"), BODIES)
def test_frozen_model_answers_bit_for_bit_like_the_trained_one(body, hidden_act):
    model = build(body, hidden_act)
    ids = torch.randint(0, 60, (2, 9))
    trained = model(ids).logits
    bitnet.freeze(model)
    assert torch.equal(model(ids).logits, trained)


def test_subln_normalizes_what_the_output_projections_read():
    names = dict(build().named_modules())
    assert "model.layers.0.self_attn.attn_sub_norm" in names
    assert "model.layers.1.mlp.ffn_sub_norm" in names
    assert not any("sub_norm" in name for name, _ in build("llama", "silu").named_modules())


def test_a_model_and_its_dense_twin_start_from_the_same_weights():
    twin, model = build(layer=None).state_dict(), build().state_dict()
    assert list(twin) == list(model)
    assert all(torch.equal(twin[name], model[name]) for name in twin)


def test_building_a_model_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = build(seed=1), build(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_a_hugging_face_folder_gives_its_weights_back(tmp_path):
    model = build(layer=None)
    model.save_pretrained(tmp_path / "dense")
    again = from_directory(tmp_path / "dense")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    converted = causal_lm(vocab_size=60, path=tmp_path / "dense", layer=BitLinear158.from_linear)
    assert len(bit_linears(converted)) == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"body": "gpt"}, "model.body must be one of bitnet, llama, got 'gpt'"),
        ({"hidden_act": "gelu"}, "model.hidden_act must be one of relu2, silu, got 'gelu'"),
        ({"body": "llama"}, "model.body=llama goes with model.hidden_act=silu"),
        ({"size": None}, "model.size is missing"),
    ],
)
def test_an_impossible_body_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        build(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be positive, got 0"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "even multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads, got 3"),
    ],
)
def test_an_impossible_size_is_refused(change, message):
    fields = {name: getattr(SIZE, name) for name in SIZE.__slots__}
    with pytest.raises(InputError, match=message):
        Size(**{**fields, **change})


def damaged(folder, change):
    """A saved model with its tensors or its config changed."""
    build(layer=None).save_pretrained(folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, config: tensors.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda tensors, config: tensors.update(stray=torch.zeros(2)), "has no place for: stray"),
        (lambda tensors, config: config.update(hidden_size=64), "does not load as a causal"),
        (lambda tensors, config: tensors["model.norm.weight"].fill_(float("nan")), "model.norm.weight has values"),
        (lambda tensors, config: config.update(quantization_config={"quant_method": "gptq"}), "quantized with 'gptq'"),
        (
            lambda tensors, config: config.update(quantization_config={"quant_method": "bitnet"}),
            "quantized with 'bitnet'",
        ),
    ],
)
def test_a_damaged_or_quantized_folder_is_refused(tmp_path, change, message):
    folder = damaged(tmp_path / "model", change)
    with pytest.raises(InputError, match=message):
        from_directory(folder)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"model\.path must be a Hugging Face directory"):
        from_directory(tmp_path)


def test_a_truncated_weight_file_is_refused(tmp_path):
    build(layer=None).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="does not load as a causal language model"):
        from_directory(tmp_path)


def test_a_tokenizer_larger_than_the_pretrained_vocabulary_is_refused(tmp_path):
    build(layer=None).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has 60 embeddings for a tokenizer of 61 tokens"):
        causal_lm(vocab_size=61, path=tmp_path)
