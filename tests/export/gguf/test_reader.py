"""Files of other programs load; files that are damaged or lie do not, and say what is wrong."""

import struct

import gguf
import numpy as np
import pytest
import torch

from bitnet.errors import InputError
from bitnet.export.gguf import GGUFExporter, read, verify
from bitnet.export.gguf.container import Container
from bitnet.export.gguf.types import TYPES
from bitnet.export.parity import logits, token_ids
from bitnet.nn import QuantizedLinear, bit_linears
from bitnet.quant import QTensor, absmax


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch):
    monkeypatch.setattr(verify.llama_cpp, "computes", lambda file: False)


@pytest.fixture
def written(b158, tmp_path):
    """A good file."""
    GGUFExporter(type="TQ2_0").write(b158("llama"), None, tmp_path / "m.gguf")
    return tmp_path / "m.gguf"


def edit(path, tensor: str, offset: int, data: bytes) -> None:
    start = Container(path).tensors[tensor].start + offset
    whole = path.read_bytes()
    path.write_bytes(whole[:start] + data + whole[start + len(data) :])


def rewrite(path, *, values=None, drop=(), extra=None, shapes=None) -> None:
    """The same file by gguf-py, with metadata changed and tensors dropped, added or cut."""
    source = gguf.GGUFReader(path)
    pairs = {name: field.contents() for name, field in source.fields.items() if not name.startswith("GGUF.")}
    pairs.update(values or {})
    writer = gguf.GGUFWriter(path.with_suffix(".new"), pairs.pop("general.architecture"))
    for key, value in pairs.items():
        if value is None:
            continue
        kind = gguf.GGUFValueType.get_type(value)
        if isinstance(value, int) and not isinstance(value, bool):
            kind = gguf.GGUFValueType.UINT32
        writer.add_key_value(key, value, kind)
    for each in source.tensors:
        if each.name in drop:
            continue
        data = each.data if each.name not in (shapes or {}) else each.data[: shapes[each.name]]
        writer.add_tensor(each.name, data, raw_dtype=each.tensor_type)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


def refused(path, match: str) -> None:
    with pytest.raises(InputError, match=match):
        read(path)


def test_the_same_file_from_gguf_py_reads_the_same(written, b158):
    rewrite(written)
    model = b158("llama")
    ids = token_ids(model)
    assert torch.equal(logits(read(written).model, ids), logits(model, ids))


def foreign(path, model, types: dict[str, str]) -> None:
    """A file as other converters write it: no keys of ours, block scales, gguf-py's own quantizers."""
    writer = gguf.GGUFWriter(path, "bitnet")
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(2)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().half().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight.detach().float().numpy()
            kind = types.get(theirs)
            if kind:
                weight = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
            raw = gguf.GGMLQuantizationType[kind] if kind else None
            writer.add_tensor(f"blk.{i}.{theirs}.weight", weight, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_of_another_program_loads_with_all_its_types(tiny, tmp_path):
    model = tiny("bitnet")
    model.config.rms_norm_eps = 1e-5
    types = {"attn_q": "Q8_0", "ffn_up": "Q4_0", "ffn_gate": "BF16", "attn_v": "F16"}
    foreign(tmp_path / "x.gguf", model, types)
    loaded = read(tmp_path / "x.gguf")
    layer = loaded.model.model.layers[0]
    assert layer.self_attn.q_proj.weight.type == "Q8_0"
    assert layer.mlp.up_proj.weight.type == "Q4_0"
    assert type(layer.mlp.gate_proj) is torch.nn.Linear
    assert layer.self_attn.q_proj.activation is None
    assert loaded.record == {}
    assert loaded.model.config.tie_word_embeddings
    ids = token_ids(model)
    expected, found = logits(model, ids), logits(loaded.model, ids)
    assert 0 < float((expected - found).norm() / expected.norm()) < 0.1


def test_a_ternary_file_of_another_program_quantizes_its_inputs(b158, tmp_path):
    model = b158("bitnet", frozen=False)
    with torch.no_grad():
        for _, layer in bit_linears(model):  # already ternary, so that gguf-py's quantizer keeps the codes
            layer.weight.data = layer.quantized_weight().dequantize()
    foreign(tmp_path / "x.gguf", model, dict.fromkeys(["attn_q", "attn_k", "attn_v", "ffn_up"], "TQ2_0"))
    up = read(tmp_path / "x.gguf").model.model.layers[1].mlp.up_proj
    assert isinstance(up, QuantizedLinear)
    assert up.activation is absmax
    assert isinstance(up.weight, QTensor)
    assert up.weight.scale.shape == (1, 1)
    expected = dict(bit_linears(model))["model.layers.1.mlp.up_proj"].quantized_weight()
    assert torch.equal(up.weight.qdata, expected.qdata)


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(written, value):
    edit(written, "blk.0.attn_v.scale", 0, struct.pack("<f", value))
    refused(written, r"blk\.0\.attn_v\.scale must be positive and finite")


def test_codes_that_are_none_are_refused(written):
    edit(written, "blk.1.ffn_up.weight", 70, b"\xff")
    refused(written, r"blk\.1\.ffn_up\.weight: TQ2_0 holds the codes")


def test_a_nan_in_a_norm_or_an_embedding_is_refused(written):
    whole = written.read_bytes()
    for name in ("blk.1.ffn_norm.weight", "token_embd.weight"):
        written.write_bytes(whole)
        edit(written, name, 8, struct.pack("<f", float("nan")))
        refused(written, f"{name} holds NaN or infinity")


def test_missing_added_and_misshapen_tensors_are_refused(written):
    whole = written.read_bytes()
    for options, match in (
        ({"drop": ("blk.1.ffn_up.weight",)}, r"lacks blk\.1\.ffn_up\.weight"),
        ({"drop": ("token_embd.weight",)}, r"lacks the matrix token_embd"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(256, np.float32)}}, "lacks"),
        ({"extra": {"blk.7.ffn_up.weight": np.ones((2, 2), np.float32)}}, "has no place for"),
        ({"extra": {"rope_freqs.weight": np.ones(32, np.float32)}}, r"rope_freqs\.weight, which .* no place for"),
        ({"extra": {"token_embd.scale": np.ones(1, np.float32)}}, "token_embd.scale"),
        ({"shapes": {"blk.1.attn_norm.weight": 128}}, r"attn_norm\.weight must be \[256\], got \[128\]"),
        ({"shapes": {"output.weight": 300}}, r"output\.weight must be \[320, 256\]"),
    ):
        written.write_bytes(whole)
        rewrite(written, **options)
        refused(written, match)


def test_metadata_that_the_tensors_do_not_bear_out_is_refused(written):
    whole = written.read_bytes()
    for values, match in (
        ({"general.architecture": "gpt2"}, "architecture 'gpt2'"),
        ({"llama.block_count": 2**31}, "announces 2147483648 blocks"),
        ({"llama.block_count": 0}, "announces 0 blocks"),
        ({"llama.block_count": 1}, "no place for"),
        ({"llama.embedding_length": 512}, "embedding_length is 512"),
        ({"llama.feed_forward_length": 2**30}, "feed_forward_length is"),
        ({"llama.vocab_size": 5}, "vocab_size is 5"),
        ({"llama.attention.head_count": 0}, "0 heads"),
        ({"llama.attention.head_count": 3}, "3 heads"),
        ({"llama.attention.head_count_kv": 3}, "3 key-value heads"),
        ({"llama.attention.key_length": 32}, "key_length is 32"),
        ({"llama.attention.head_count": "four"}, "a whole number"),
        ({"llama.rope.scaling.type": "yarn"}, "scaled by 'yarn'"),
        ({"llama.attention.sliding_window": 5}, "is not computed here"),
        ({"llama.expert_count": 8}, "is not computed here"),
        ({"bitnet_qat.activation": "{"}, "no json"),
        ({"bitnet_qat.activation": '{"type": "os.system"}'}, "os.system"),
        ({"bitnet_qat.record": "[]"}, "json object"),
    ):
        written.write_bytes(whole)
        rewrite(written, values=values)
        refused(written, match)


def test_a_tied_head_where_the_architecture_has_none_of_its_own(b158, tmp_path):
    GGUFExporter().write(b158("bitnet"), None, tmp_path / "m.gguf")
    rewrite(tmp_path / "m.gguf", extra={"output.weight": np.ones((320, 256), np.float32)})
    refused(tmp_path / "m.gguf", "bitnet takes the embedding for the head")


def test_reading_codes_needs_no_memory_for_those_left_in_the_file(written):
    assert TYPES["TQ2_0"].size((512, 256)) == 512 * 66
    linears = [each for each in read(written).model.modules() if isinstance(each, QuantizedLinear)]
    assert len(linears) == 14


def test_any_flipped_byte_is_refused_or_gives_a_model_whose_values_are_finite(written):
    whole = written.read_bytes()
    generator = np.random.default_rng(0)
    for at in generator.integers(0, len(whole), 25):
        written.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            model = read(written).model
        except InputError:
            continue
        assert bool(torch.isfinite(logits(model, token_ids(model))).all())


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("llama.context_length", 0, "between 1 and 4294967296, got 0"),
        ("llama.rope.freq_base", 0.0, "between 1 and inf"),
        ("llama.rope.freq_base", -1.0, "between 1 and inf"),
        ("llama.rope.freq_base", 1e-45, "between 1 and inf"),
        ("llama.attention.layer_norm_rms_epsilon", 0.0, "between 1e-30 and 1"),
        ("llama.attention.layer_norm_rms_epsilon", 1e30, "between 1e-30 and 1"),
        ("tokenizer.ggml.padding_token_id", 320, "padding_token_id is 320, and the model has 320 tokens"),
        ("tokenizer.ggml.eos_token_id", 2**31, "the model has 320 tokens"),
        ("bitnet_qat.generation", "[", "is no json"),
        ("bitnet_qat.generation", "[1]", "a json object"),
        ("bitnet_qat.generation", '{"eos_token_id": [1, 320]}', "eos_token_id must be ids of the 320 tokens, got 320"),
        ("bitnet_qat.generation", '{"watermarking_config": 3}', "cannot be used"),
    ],
)
def test_settings_out_of_their_range_are_refused(written, key, value, match):
    rewrite(written, values={key: value})
    refused(written, match)
