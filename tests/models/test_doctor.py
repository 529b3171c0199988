"""The report on a conversion names every linear, and says of the dense ones why."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

import bitnet
from bitnet import InputError
from bitnet.models import diagnose_conversion
from bitnet.models.doctor import alike


def build(kind: str, **settings) -> transformers.PreTrainedModel:
    shape = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(kind, **{**shape, **settings})
        return transformers.AutoModelForCausalLM.from_config(config)


def test_every_linear_is_in_the_report_once():
    model = build("qwen2")
    report = diagnose_conversion(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted([*report.shapes, *report.dense]) == sorted(linears)
    assert report.dense == {"lm_head": "the output head"}
    assert report.shapes["model.layers.1.mlp.down_proj"] == (32, 48)
    assert report.biases == tuple(f"model.layers.{n}.self_attn.{x}_proj" for n in range(2) for x in "qkv")


def test_the_report_is_the_same_before_and_after_the_conversion():
    model = build("gpt2", n_embd=32, n_layer=2, n_head=4)
    before = diagnose_conversion(model)
    assert before.shapes["transformer.h.0.attn.c_attn"] == (96, 32)  # Conv1D keeps [32, 96]
    assert before.tied == (("transformer.wte.weight", "lm_head.weight"),)
    converted = copy.deepcopy(model)
    assert tuple(bitnet.convert(converted)) == tuple(before.shapes)
    assert diagnose_conversion(converted) == before


def test_patterns_are_those_of_the_conversion():
    model = build("llama")
    report = diagnose_conversion(model, include=["q_proj"], exclude=["layers.0.*"])
    assert list(report.shapes) == ["model.layers.1.self_attn.q_proj"]
    assert report.dense["model.layers.0.mlp.up_proj"] == "excluded by a pattern"
    assert report.dense["lm_head"] == "no pattern of include matches it"
    with pytest.raises(InputError, match="pattern 'w_proj' matches none"):
        diagnose_conversion(model, exclude=["w_proj"])


def test_norms_of_queries_and_keys_and_experts_in_one_tensor_are_named():
    report = diagnose_conversion(build("qwen3_moe", num_experts=4, moe_intermediate_size=16, head_dim=16))
    assert {"model.layers.0.self_attn.q_norm", "model.layers.0.self_attn.k_norm", "model.norm"} <= set(report.norms)
    assert report.stacked == {f"model.layers.{n}.mlp.experts": 4 * 3 * 16 * 32 for n in range(2)}
    assert report.head_dim == 16
    rows = report.rows()
    assert rows["experts left dense"] == "model.layers.*.mlp.experts (6,144 weights in one tensor) (2 times)"
    assert rows["head dimension"] == "16"
    assert rows["rows of no multiple of 256 weights"] == "32, 64"


def test_the_share_of_quantized_weights_counts_tied_matrices_once():
    report = diagnose_conversion(build("llama", tie_word_embeddings=True, hidden_size=64, head_dim=16))
    linears = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 48 * 64)
    assert report.quantized_share == pytest.approx(linears / (linears + 60 * 64 + 5 * 64))


def test_a_subclass_of_linear_is_named_and_left():
    class Lora(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Lora(4, 4)})
    report = diagnose_conversion(model)
    assert list(report.shapes) == ["a"]
    assert report.dense == {"b": "it is a Lora, whose forward pass may be another"}
    assert report.head_dim is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bitnet.convert(model) == ["a"]


def test_names_that_differ_in_numbers_are_one_entry():
    assert alike(["a.0.b", "a.1.b", "a.10.c", "b.0"]) == "a.*.b (2 times), a.*.c, b.0"
