"""SubLN in a pretrained model: the dense model's function as nearly as gains keep it, in a body that exports know."""

import pytest
import torch
import torch.nn.functional as F
import transformers

import bitnet
from bitnet import InputError
from bitnet.export import HuggingFaceExporter, PackedExporter
from bitnet.export.packed_read import read
from bitnet.models import causal_lm, from_directory, insert_subln
from bitnet.models.subln import sub_norms

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}


def build(kind="llama", **settings) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)  # biases, too
    return model


def text(windows=6, seed=0) -> torch.Tensor:
    return torch.randint(3, 60, (windows, 20), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def answers(model, ids) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(("kind", "settings"), [("llama", {}), ("llama", {"attention_bias": True}), ("qwen2", {})])
def test_where_all_tokens_are_of_one_size_nothing_changes(kind, settings):
    model = build(kind, **settings)
    ids = torch.full((2, 9), 7)  # one token again and again: every position reads the same
    made = insert_subln(model, ids)
    torch.testing.assert_close(answers(made, ids), answers(model, ids), rtol=1e-4, atol=1e-4)


def test_gains_are_the_least_squares_of_every_channel():
    model = build()
    inputs = {}
    for name, layer in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)}))
    made = insert_subln(model, text())
    answers(model, text())
    x = inputs["model.layers.1.mlp.down_proj"].double()
    y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = torch.stack([torch.linalg.lstsq(y[:, [j]], x[:, j]).solution[0] for j in range(48)])
    torch.testing.assert_close(made.model.layers[1].mlp.ffn_sub_norm.weight.double(), expected, rtol=1e-5, atol=1e-7)
    assert len(sub_norms(made)) == 4


def test_fitted_gains_keep_the_function_better_than_gains_of_one():
    model = build()
    for block in model.model.layers:
        block.self_attn.v_proj.weight.data *= 0.1  # sizes that are not 1 by chance
        block.mlp.up_proj.weight.data *= 0.1
    made = insert_subln(model, text())
    expected = F.log_softmax(answers(model, text(seed=1)), -1)

    def divergence() -> float:
        return float((expected.exp() * (expected - F.log_softmax(answers(made, text(seed=1)), -1))).sum(-1).mean())

    fitted = divergence()
    for norm in sub_norms(made).values():
        torch.nn.init.ones_(norm.weight)
    assert fitted < 0.5 * divergence()


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_the_dense_models_own_and_it_stays_as_it_is(tied):
    model = build(tie_word_embeddings=tied).train()
    before = answers(model, text())
    state = torch.get_rng_state()
    made = insert_subln(model, text())
    assert torch.equal(torch.get_rng_state(), state)
    ours, theirs = dict(made.named_parameters()), dict(model.named_parameters())
    assert all(ours[name] is theirs[name] for name in theirs)
    assert {name for name in ours if name not in theirs} == {f"{name}.weight" for name in sub_norms(made)}
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied
    assert torch.equal(answers(model, text()), before)
    assert made.training
    assert model.training
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_the_result_is_converted_exported_and_read_back(tmp_path):
    made = insert_subln(build(), text())
    HuggingFaceExporter().write(made, None, tmp_path / "hf")
    again = from_directory(tmp_path / "hf")
    assert again.config.model_type == "bitnet"
    assert torch.equal(answers(again, text()), answers(made, text()))
    bitnet.convert(made)
    loaded = read(PackedExporter().write(made, None, tmp_path / "packed").path).model
    assert torch.equal(answers(loaded, text()), answers(made, text()))


def test_a_folder_becomes_a_quantized_model_with_subln(tmp_path):
    build().save_pretrained(tmp_path)
    made = causal_lm(
        vocab_size=60, path=tmp_path, layer=bitnet.BitLinear158.from_linear, subln=True, calibration=text()
    )
    assert len(sub_norms(made)) == 4
    assert len(bitnet.nn.bit_linears(made)) == 14
    with pytest.raises(InputError, match=r"model\.subln=true goes into a pretrained model"):
        causal_lm(vocab_size=60, path=tmp_path, subln=True)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("gemma", {"head_dim": 8}, "whose blocks are BitNet's but for it; got gemma"),
        ("qwen3", {"head_dim": 8}, "got qwen3"),
        ("mistral", {"sliding_window": 16}, "attention in a sliding window"),
        ("llama", {"mlp_bias": True}, "biases in its feed-forward"),
        ("llama", {"head_dim": 16}, "heads that are not as wide"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_a_body_that_bitnet_has_no_word_for_is_refused(kind, settings, message):
    with pytest.raises(InputError, match=message):
        insert_subln(build(kind, **settings), text())


def test_a_quantized_model_is_refused():
    model = build()
    bitnet.convert(model)
    with pytest.raises(InputError, match="insert SubLN before the conversion"):
        insert_subln(model, text())
