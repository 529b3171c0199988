"""What is written reads back as the model, bit for bit; what does not fit is refused; nothing is left half done."""

import os
import shutil

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from bitnet.errors import InputError
from bitnet.export.gguf import GGUFExporter, exporter, read, verify
from bitnet.export.gguf.container import Container, Value
from bitnet.export.gguf.tokenizer import tokenizer_pairs
from bitnet.export.gguf.types import TYPES
from bitnet.export.parity import logits, token_ids
from bitnet.export.protocol import ExportError
from bitnet.nn import BitLinear, BitLinear158, QuantizedEmbedding, QuantizedLinear, convert, freeze, pack
from bitnet.ptq import BiLLM, KQuant, RoundToNearest, quantize
from bitnet.quant import SEQ, absmax, absmax_b1, absmean_ternary
from bitnet.quant.ggml import GGMLWeight, absmax_blocks


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch):
    """llama.cpp's own answers are `test_llama_cpp`'s."""
    monkeypatch.setattr(verify.llama_cpp, "computes", lambda file: False)


def tensors(path) -> dict[str, gguf.ReaderTensor]:
    return {each.name: each for each in gguf.GGUFReader(path).tensors}


def ptq(model, method):
    ids = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    quantize(model, method, ids)
    return model


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    ("body", "type"),
    [
        ("llama", "TQ2_0"),
        ("llama", "TQ1_0"),
        ("llama", "Q2_0"),
        ("llama", "I2_S"),
        ("bitnet", "auto"),
        ("bitnet", "I2_S"),
        ("qwen3", "TQ2_0"),
        ("mistral", "TQ2_0"),
    ],
)
def test_ternary_models_read_back_bit_for_bit(b158, tmp_path, body, type, frozen):
    model = b158(body, frozen=frozen)
    exported = GGUFExporter(type=type).write(model, None, tmp_path / "m.gguf")
    loaded = read(tmp_path / "m.gguf")
    ids = token_ids(model)
    assert torch.equal(logits(loaded.model, ids), logits(model, ids))
    assert exported.difference == 0.0
    assert exported.layers == 14
    assert exported.bytes == (tmp_path / "m.gguf").stat().st_size
    assert loaded.format == exported.format == f"gguf {'TQ2_0' if type == 'auto' else type}"
    linears = [each for each in loaded.model.modules() if isinstance(each, QuantizedLinear)]
    assert len(linears) == 14
    assert all(each.activation is absmax for each in linears)
    assert loaded.tokenizer is None


@pytest.mark.parametrize("act", ["relu2", "silu"])
def test_squared_relu_goes_to_bitnet_cpp_under_its_own_architecture(b158, tmp_path, act):
    model = b158("bitnet", act=act)
    GGUFExporter(type="I2_S").write(model, None, tmp_path / "m.gguf")
    architecture = Container(tmp_path / "m.gguf").text("general.architecture")
    assert architecture == {"relu2": "bitnet-b1.58", "silu": "bitnet"}[act]
    ids = token_ids(model)
    assert torch.equal(logits(read(tmp_path / "m.gguf").model, ids), logits(model, ids))


def test_codes_lie_in_the_file_as_gguf_py_reads_them_and_scales_beside_them(b158, tmp_path):
    model = b158("bitnet")
    GGUFExporter(type="TQ2_0").write(model, None, tmp_path / "m.gguf")
    found = tensors(tmp_path / "m.gguf")
    down = model.model.layers[1].mlp.down_proj.weight
    stored = found["blk.1.ffn_down.weight"]
    values = gguf.quants.dequantize(stored.data, stored.tensor_type)
    np.testing.assert_array_equal(values, down.qdata.float().numpy())
    assert found["blk.1.ffn_down.scale"].data.tolist() == [float(down.scale)]
    np.testing.assert_array_equal(
        found["blk.0.attn_sub_norm.weight"].data, model.model.layers[0].self_attn.attn_sub_norm.weight.detach().numpy()
    )
    assert "output.weight" not in found


@pytest.mark.parametrize(("name", "heads"), [("q_proj", 4), ("k_proj", 2)])
def test_rows_of_q_and_k_are_interleaved_for_llama(tiny, tmp_path, name, heads):
    model = tiny("llama")
    GGUFExporter().write(model, None, tmp_path / "m.gguf")
    ours = getattr(model.model.layers[0].self_attn, name).weight.detach()
    stored = torch.from_numpy(tensors(tmp_path / "m.gguf")[f"blk.0.attn_{name[0]}.weight"].data.copy())
    half = 32  # heads of 64: row 2i of a head is transformers' row i, row 2i + 1 its row i + 32
    for head in range(heads):
        for i in range(half):
            assert torch.equal(stored[64 * head + 2 * i], ours[64 * head + i])
            assert torch.equal(stored[64 * head + 2 * i + 1], ours[64 * head + half + i])


def test_biases_are_carried_and_interleaved_like_their_rows(tiny, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=50, attention_bias=True, mlp_bias=True)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    GGUFExporter().write(model, None, tmp_path / "m.gguf")
    bias = model.model.layers[0].self_attn.q_proj.bias.detach()
    stored = tensors(tmp_path / "m.gguf")["blk.0.attn_q.bias"].data
    assert stored[:4].tolist() == [float(bias[0]), float(bias[8]), float(bias[1]), float(bias[9])]
    ids = token_ids(model)
    assert torch.equal(logits(read(tmp_path / "m.gguf").model, ids), logits(model, ids))


@pytest.mark.parametrize("method", [KQuant(type=name, importance=False) for name in ("Q4_K", "Q2_K", "Q8_0", "Q4_0")])
def test_k_quants_keep_their_bytes(tiny, tmp_path, method):
    model = ptq(tiny("llama", wide=256), method)
    exported = GGUFExporter().write(model, None, tmp_path / "m.gguf")
    assert exported.format == f"gguf {method.type}"
    weight = model.model.layers[0].mlp.up_proj.weight
    stored = tensors(tmp_path / "m.gguf")["blk.0.ffn_up.weight"]
    assert stored.data.tobytes() == weight.data.numpy().tobytes()
    loaded = read(tmp_path / "m.gguf").model
    assert isinstance(loaded.model.layers[0].mlp.up_proj.weight, GGMLWeight)
    assert loaded.model.layers[0].mlp.up_proj.activation is None
    ids = token_ids(model)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_mixed_types_in_one_file(tiny, tmp_path):
    model = ptq(tiny("llama", wide=256), KQuant(type="Q8_0"))
    model.model.layers[0].mlp.down_proj = QuantizedLinear(absmean_ternary(torch.randn(256, 256)), activation=None)
    exported = GGUFExporter().write(model, None, tmp_path / "m.gguf")
    assert "Q8_0 and TQ2_0" in exported.contents


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_rounded_to_nearest_codes_are_carried_without_loss(tiny, tmp_path, bits):
    model = ptq(tiny("llama"), RoundToNearest(symmetric=False, bits=bits, granularity=64))
    exported = GGUFExporter().write(model, None, tmp_path / "m.gguf")
    assert exported.format == ("gguf Q4_0" if bits < 4 else "gguf Q8_0")
    assert exported.difference < 1e-6


def test_the_signs_of_b1_take_one_bit(b158, tmp_path):
    model = b158("llama", layer=BitLinear.from_linear)
    exported = GGUFExporter().write(model, None, tmp_path / "m.gguf")
    assert exported.format == "gguf Q1_0"
    loaded = read(tmp_path / "m.gguf").model
    assert loaded.model.layers[0].mlp.up_proj.activation is absmax_b1
    ids = token_ids(model)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    GGUFExporter(type="TQ2_0").write(model, None, tmp_path / "t.gguf")
    assert torch.equal(logits(read(tmp_path / "t.gguf").model, ids), logits(model, ids))


def test_packed_layers_are_written_like_the_frozen_ones(b158, tmp_path):
    model = b158("llama")
    GGUFExporter().write(model, None, tmp_path / "a.gguf")
    pack(model)
    GGUFExporter().write(model, None, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("type", "bits"), [("TQ2_0", 2.0625), ("TQ1_0", 1.6875), ("Q2_0", 2.25), ("I2_S", 2.0), ("Q4_K", 4.5)]
)
def test_a_file_is_as_large_as_its_parts(tiny, b158, tmp_path, type, bits):
    model = ptq(tiny("llama"), KQuant(type=type, importance=False)) if type == "Q4_K" else b158("llama")
    exported = GGUFExporter(type="auto" if type == "Q4_K" else type).write(model, None, tmp_path / "m.gguf")
    quantized = 2 * (256 * 256 * 2 + 128 * 256 * 2 + 3 * 256 * 512)
    dense = 2 * 320 * 256 * 4 + 5 * 256 * 4
    overhead = exported.bytes - quantized * bits / 8 - dense
    assert 0 < overhead < 6000  # header, scales, padding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dense_values_take_the_narrowest_type_that_holds_them(tiny, tmp_path, dtype):
    model = tiny("llama")
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.to(dtype).float()
    GGUFExporter().write(model, None, tmp_path / "m.gguf")
    expected = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    file = Container(tmp_path / "m.gguf")
    assert file.tensors["token_embd.weight"].type.name == expected
    assert file.tensors["blk.0.ffn_up.weight"].type.name == "F32"
    ids = token_ids(model)
    assert torch.equal(logits(read(tmp_path / "m.gguf").model, ids), logits(model, ids))


def test_a_bfloat16_model_reads_back_in_its_own_dtype(tiny, tmp_path):
    model = tiny("llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    convert(model)
    freeze(model)
    exported = GGUFExporter().write(model, None, tmp_path / "m.gguf")
    assert exported.difference == 0.0
    ids = token_ids(model)
    assert torch.equal(logits(read(tmp_path / "m.gguf", dtype=torch.bfloat16).model, ids), logits(model, ids))
    model.bfloat16()
    assert "rotary frequencies was rounded to 16 bits" in problems(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embeddings", ["f32", "f16", "bf16", "q8_0"])
def test_embeddings_and_head_in_a_chosen_type(b158, tmp_path, embeddings, tied):
    model = b158("llama", tied=tied)
    exported = GGUFExporter(embeddings=embeddings).write(model, None, tmp_path / "m.gguf")
    file = Container(tmp_path / "m.gguf")
    assert file.tensors["token_embd.weight"].type.name == embeddings.upper()
    assert ("output.weight" in file.tensors) is not tied
    assert (exported.difference == 0.0) is (embeddings == "f32")
    loaded = read(tmp_path / "m.gguf").model
    head, table = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert isinstance(table, QuantizedEmbedding) is (embeddings == "q8_0")
    assert isinstance(head, QuantizedLinear) is (embeddings == "q8_0")
    assert loaded.config.tie_word_embeddings is tied
    if tied and embeddings != "q8_0":
        assert head.weight is table.weight


def test_an_embedding_quantized_after_training_is_carried_where_it_is_a_gguf_type(tiny, tmp_path):
    model = tiny("llama")
    weight = absmax_blocks(model.model.embed_tokens.weight.detach(), "Q8_0")
    model.model.embed_tokens = QuantizedEmbedding(weight)
    GGUFExporter().write(model, None, tmp_path / "m.gguf")
    model.model.embed_tokens = QuantizedEmbedding(absmax(torch.randn(320, 256)))
    assert "set embeddings=q8_0" in GGUFExporter().problems(model)[0]


def test_block_scales_are_rounded_and_said_to_be(b158, tmp_path):
    exported = GGUFExporter(type="TQ2_0", scale="block").write(b158("bitnet"), None, tmp_path / "m.gguf")
    assert "scales rounded to float16" in exported.contents
    assert not any(name.endswith(".scale") for name in Container(tmp_path / "m.gguf").tensors)
    assert 0 < exported.difference < 0.1


def test_the_record_comes_back_and_names_the_model(b158, tmp_path):
    record = {"model": "bitnet nano", "method": "b1.58 frozen", "perplexity": 12.5, "seed": 3}
    GGUFExporter().write(b158("bitnet"), None, tmp_path / "m.gguf", record)
    assert read(tmp_path / "m.gguf").record == record
    assert Container(tmp_path / "m.gguf").text("general.name") == "bitnet nano b1.58 frozen"


def test_rotary_positions_scaled_linearly_come_back(tiny, tmp_path):
    model = tiny("mistral", rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0})
    GGUFExporter().write(model, None, tmp_path / "m.gguf")
    loaded = read(tmp_path / "m.gguf").model
    assert loaded.config.rope_parameters == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    ids = token_ids(model)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def problems(model, **options) -> str:
    return "; ".join(GGUFExporter(**options).problems(model))


def test_models_that_fit_have_no_problems(tiny, b158):
    for body in ("llama", "bitnet", "qwen2", "qwen3", "mistral"):
        scale = "block" if body == "qwen2" else "tensor"
        assert GGUFExporter(scale=scale).problems(b158(body, frozen=False)) == []
        assert GGUFExporter().problems(tiny(body)) == []


def test_scales_that_llama_cpp_would_not_use_or_use_wrongly_are_refused(b158, tiny):
    assert "ignores the tensors .scale" in problems(b158("qwen2"))
    biased = tiny("llama")
    biased.model.layers[0].mlp.down_proj = QuantizedLinear(
        absmean_ternary(torch.randn(256, 512)), torch.randn(256), absmax
    )
    assert "multiplies the biases" in problems(biased)
    assert problems(biased, scale="block") == ""


def test_a_qwen2_model_is_carried_with_rounded_scales(b158, tmp_path):
    model = b158("qwen2")
    exported = GGUFExporter(scale="block").write(model, None, tmp_path / "m.gguf")
    assert 0 < exported.difference < 0.1
    loaded = read(tmp_path / "m.gguf").model
    assert torch.equal(loaded.model.layers[0].self_attn.q_proj.bias, model.model.layers[0].self_attn.q_proj.bias)


def test_what_llama_cpp_would_compute_wrongly_is_refused_with_what_would_fit(tiny, b158):
    assert "computes silu, the model relu2: it would load and be wrong" in problems(b158("bitnet", act="relu2"))
    assert "tie_word_embeddings=true" in problems(b158("bitnet", tied=False))
    assert "'llama3' are not written" in problems(
        tiny(
            "mistral",
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        )
    )
    assert "sliding window of 16" in problems(tiny("mistral", sliding_window=16))
    from transformers import GPT2Config, GPT2LMHeadModel

    assert "no architecture" in problems(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=20)))


def test_what_has_no_place_in_a_file_is_refused_with_what_would_fit(tiny, b158):
    narrow = b158("llama", hidden=192, wide=384)
    assert "in_features must be a multiple of 256 for TQ2_0, got 192" in problems(narrow, type="TQ2_0")
    assert problems(narrow, type="Q2_0") == ""
    by_row = b158("llama", frozen=False, layer=lambda each: BitLinear158.from_linear(each, quantizer=_by_row))
    assert "granularity tensor, or set scale=block" in problems(by_row)
    assert problems(by_row, scale="block") == ""
    learned = b158("llama", frozen=False, layer=lambda each: BitLinear158.from_linear(each, quantizer=SEQ(bits=1.58)))
    assert problems(learned, scale="block") == ""  # a learned scale is no tensor of the file
    model = tiny("llama")
    model.model.layers[0].mlp.down_proj = QuantizedLinear(
        BiLLM().quantize(torch.randn(256, 512), _statistics(512)), activation=None
    )
    assert "has no GGUF type: quantize with ptq=kquant" in problems(model)
    biased = tiny("bitnet")
    biased.model.layers[0].self_attn.o_proj = nn.Linear(256, 256)
    assert "o_proj.bias has no place (1 in all): the architecture bitnet has no biases there" in problems(biased)
    mixed = b158("llama")
    mixed.model.layers[0].mlp.down_proj.activation = absmax_b1
    assert "quantize their inputs in different ways" in problems(mixed)


def _by_row(weight):
    return absmean_ternary(weight, granularity="row")


def _statistics(columns):
    from bitnet.ptq import LayerStats

    x = torch.randn(64, columns)
    return LayerStats(n_tokens=64, hessian=x.T @ x)


@pytest.mark.parametrize(
    "options",
    [{"type": "Q4_K"}, {"scale": "row"}, {"embeddings": "int8"}, {"dense": "q8_0"}, {"type": "I2_S", "scale": "block"}],
)
def test_unknown_options_are_refused(options):
    with pytest.raises(InputError):
        GGUFExporter(**options)


def test_a_file_that_exists_and_weights_that_are_not_finite_are_refused(b158, tmp_path):
    model = b158("bitnet")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        GGUFExporter().write(model, None, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(InputError, match=r"model.norm.weight holds NaN"):
        GGUFExporter().write(model, None, tmp_path / "n.gguf")
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_how_the_model_generates_comes_back_whatever_transformers_thinks_of_it(b158, bpe, tmp_path):
    model = b158("llama")
    model.generation_config = GenerationConfig(eos_token_id=[1, 7], temperature=0.6, max_new_tokens=5)  # no do_sample
    GGUFExporter().write(model, bpe(), tmp_path / "m.gguf")
    assert Container(tmp_path / "m.gguf").integer("tokenizer.ggml.eot_token_id") == 7
    found = read(tmp_path / "m.gguf").model.generation_config
    assert (found.eos_token_id, found.temperature, found.max_new_tokens) == ([1, 7], 0.6, 5)
    assert found.to_diff_dict() == model.generation_config.to_diff_dict()


def test_ends_that_are_no_tokens_are_refused_before_any_work(b158):
    model = b158("llama")
    model.generation_config.eos_token_id = [1, 320]
    [problem] = GGUFExporter().problems(model)
    assert problem == "model.generation_config: eos_token_id must be ids of the 320 tokens, got 320"


def test_chat_templates_that_do_not_read_back_are_said_to_be_them(b158, bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "tokenizer_pairs", lambda *a: {**tokenizer_pairs(*a), **changed})
    changed = {"tokenizer.chat_template": Value("str", "B")}
    with pytest.raises(ExportError, match="other chat templates"):
        GGUFExporter().write(b158("llama"), bpe(template="A"), tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == []


def test_a_file_that_appears_while_one_is_written_stays(b158, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "verify", lambda path, *a: (tmp_path / "m.gguf").write_text("theirs") and {})
    with pytest.raises(InputError, match="exists already"):
        GGUFExporter().write(b158("llama"), None, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "theirs"


def test_embeddings_too_large_for_float16_are_refused(tiny, tmp_path):
    model = tiny("llama")
    model.model.embed_tokens.weight.data[0, 0] = 1e6
    with pytest.raises(InputError, match="too large for F16"):
        GGUFExporter(embeddings="f16").write(model, None, tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == []


def _flip_a_code(path):
    entry = Container(path).tensors["blk.1.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[entry.start] = {0: 1}.get(data[entry.start] & 3, 0) | data[entry.start] & 0xFC
    path.write_bytes(data)


def _change_a_norm(path):
    entry = Container(path).tensors["blk.1.ffn_norm.weight"]
    data = bytearray(path.read_bytes())
    data[entry.start] ^= 1
    path.write_bytes(data)


def _change_a_scale(path):
    entry = Container(path).tensors["blk.0.attn_v.scale"]
    data = bytearray(path.read_bytes())
    data[entry.start] ^= 1
    path.write_bytes(data)


def _cut(path):
    os.truncate(path, path.stat().st_size - 64)


def _change_epsilon(path):
    data = path.read_bytes()
    key = b"layer_norm_rms_epsilon"
    at = data.index(key) + len(key) + 4
    path.write_bytes(data[:at] + np.float32(0.5).tobytes() + data[at + 4 :])


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_flip_a_code, r"layers\.1\.mlp\.up_proj: the codes or scales read back"),
        (_change_a_scale, r"layers\.0\.self_attn\.v_proj: the codes or scales read back"),
        (_change_a_norm, r"layers\.1\.post_attention_layernorm\.weight reads back with other values"),
        (_cut, "truncated"),
        (_change_epsilon, "gives other logits"),
    ],
)
def test_a_file_that_reads_back_differently_fails_and_leaves_nothing(b158, tmp_path, monkeypatch, damage, match):
    def write_and_damage(path, *rest):
        write(path, *rest)
        damage(path)

    write = exporter.write_container
    monkeypatch.setattr(exporter, "write_container", write_and_damage)
    with pytest.raises(ExportError, match=match):
        GGUFExporter(type="TQ2_0").write(b158("llama"), None, tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(b158, tmp_path, monkeypatch):
    def full(path, pairs, blobs):
        write(path, pairs, blobs[:4])
        raise OSError(28, "No space left on device")

    write = exporter.write_container
    monkeypatch.setattr(exporter, "write_container", full)
    with pytest.raises(OSError, match="No space"):
        GGUFExporter().write(b158("llama"), None, tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == []


def test_the_model_stays_as_it_is(b158, tmp_path):
    model = b158("llama", frozen=False).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    GGUFExporter().write(model, None, tmp_path / "m.gguf")
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert any(isinstance(each, BitLinear158) for each in model.modules())


def test_two_files_of_one_model_are_equal(b158, tmp_path):
    for name in ("a", "b"):
        GGUFExporter().write(b158("bitnet"), None, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_model_read_outlives_its_file(b158, tmp_path):
    model = b158("llama")
    GGUFExporter().write(model, None, tmp_path / "d" / "m.gguf")
    loaded = read(tmp_path / "d" / "m.gguf").model
    shutil.rmtree(tmp_path / "d")
    ids = token_ids(model)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_file_names_say_the_type():
    assert GGUFExporter().filename == "model.gguf"
    assert GGUFExporter(type="TQ1_0").filename == "model-TQ1_0.gguf"
    assert set(TYPES) >= {"TQ2_0", "I2_S"}
