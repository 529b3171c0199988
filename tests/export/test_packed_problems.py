"""What a packed folder cannot carry is said before any work, and what it rounds is compared with what was meant."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from bitnet.errors import InputError
from bitnet.export import ExportError, HuggingFaceExporter, PackedExporter, packed
from bitnet.export.packed_read import read
from bitnet.export.parity import logits
from bitnet.nn import BitLinear, QuantizedEmbedding, convert
from bitnet.ptq import RoundToNearest, quantize
from bitnet.quant import absmax

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def llama(kind: Any = LlamaForCausalLM, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(LlamaConfig(**(SIZE | options))).eval()


def gemma() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZE, head_dim=16, pad_token_id=0)).eval()


def write(model: Any, path: Path, **options: Any) -> Any:
    return PackedExporter(**options).write(model, None, path)


def words(count: int) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({f"w{each}": each for each in range(count)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0")


def test_an_embedding_that_scales_its_rows_is_not_rounded_to_int8(tmp_path):
    model = gemma()
    with pytest.raises(
        InputError, match=r"plain nn.Embedding, and it has a Gemma2TextScaledWordEmbedding: use rest=exa"
    ):
        write(model, tmp_path / "packed", rest="int8")
    assert list(tmp_path.iterdir()) == []
    ids = torch.arange(20)[None]
    loaded = read(write(model, tmp_path / "packed").path).model
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_codes_in_the_place_of_such_an_embedding_are_refused(tmp_path):
    model = gemma()
    model.model.embed_tokens = QuantizedEmbedding(absmax(model.model.embed_tokens.weight.detach()))
    with pytest.raises(InputError, match="is a QuantizedEmbedding where Gemma2ForCausalLM has a Gemma2TextScaled"):
        write(model, tmp_path / "packed")


def test_the_model_is_as_before_whatever_the_rest_is_rounded_to(tmp_path):
    model = llama(tie_word_embeddings=True)
    convert(model)
    before = copy.deepcopy(model.state_dict())
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    modes = [module.training for module in model.modules()]
    for rest in packed.REST:
        write(model, tmp_path / rest, rest=rest)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


@pytest.mark.parametrize("rest", ["bfloat16", "int8"])
def test_a_small_fault_beside_the_rounding_is_found(tmp_path, monkeypatch, rest):
    model = llama()
    honest = packed.read

    def faulty(folder):
        loaded = honest(folder)
        for module in loaded.model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 3e-6  # was 1e-6: no tensor shows it
        return loaded

    monkeypatch.setattr(packed, "read", faulty)
    with pytest.raises(ExportError, match="gives other logits"):
        write(model, tmp_path / "packed", rest=rest)


def test_the_difference_that_is_reported_is_that_from_the_model_itself(tmp_path):
    model = llama()
    written = write(model, tmp_path / "packed", rest="int8")
    assert 1e-3 < written.difference < 0.1
    assert write(model, tmp_path / "exact").difference == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_compared_with_the_attention_that_the_model_has(tmp_path, attention, dtype):
    dense = llama()
    model = LlamaForCausalLM._from_config(dense.config, dtype=dtype, attn_implementation=attention).eval()
    model.load_state_dict(dense.state_dict())
    convert(model)
    assert write(model, tmp_path / "packed").difference == 0


@pytest.mark.parametrize("back", [False, True])
def test_rounded_rotary_tables_are_refused(tmp_path, back):
    model = llama().bfloat16()
    model = model.float() if back else model
    with pytest.raises(InputError, match=r"(rounded to 16 bits|other frequencies than its config).*model.bfloat16\(\)"):
        write(model, tmp_path / "packed")


def test_a_body_without_memory_can_be_asked():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZE))
    assert PackedExporter(rest="int8").problems(model) == []


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_of_another_purpose_is_refused(tmp_path, kind):
    with pytest.raises(InputError, match=rf"it is a {kind.__name__}, and its config describes a LlamaForCausalLM"):
        write(llama(kind, pad_token_id=0), tmp_path / "packed")


def test_a_model_that_its_config_does_not_describe_is_refused(tmp_path):
    shorter, wider = llama(), llama()
    del shorter.model.layers[1]
    wider.resize_token_embeddings(100)
    wider.config.vocab_size = 96
    for model, named in ((shorter, r"model.layers.1.*missing"), (wider, r"\(100, 32\) and not \(96, 32\)")):
        with pytest.raises(InputError, match=named):
            write(model, tmp_path / "packed")


def test_a_quantized_layer_that_the_body_has_no_place_for_is_refused(tmp_path):
    model = llama()
    convert(model)
    model.extra = copy.deepcopy(model.model.layers[0].mlp.up_proj)
    with pytest.raises(InputError, match=r"extra is a BitLinear158 where LlamaForCausalLM has a NoneType"):
        write(model, tmp_path / "packed")


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tmp_path):
    model = llama()
    with pytest.raises(InputError, match="token id 96, and the model 96 embeddings"):
        PackedExporter().write(model, words(97), tmp_path / "packed")
    PackedExporter().write(model, words(96), tmp_path / "packed")


def test_a_record_that_json_cannot_hold_is_refused_before_any_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "write_tensors", lambda *_: pytest.fail("wrote tensors"))
    with pytest.raises(InputError, match="the record must be numbers, texts"):
        PackedExporter().write(llama(), None, tmp_path / "packed", {"weights": torch.zeros(2)})


def test_how_the_model_generates_survives_packed_and_hugging_face(tmp_path):
    model = llama()
    model.generation_config = GenerationConfig(eos_token_id=[1, 7], temperature=0.7)  # transformers saves no such one
    loaded = read(write(model, tmp_path / "packed").path).model
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.temperature) == ([1, 7], 0.7)
    folder = HuggingFaceExporter().write(loaded, None, tmp_path / "hf").path
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 7]


def test_generation_settings_that_get_lost_fail_the_export(tmp_path, monkeypatch):
    model = llama()
    model.generation_config.eos_token_id = [1, 7]
    monkeypatch.setattr(packed, "write_generation", lambda *_: None)
    with pytest.raises(ExportError, match="other generation settings"):
        write(model, tmp_path / "packed")


def test_what_does_not_read_back_is_an_error_of_the_export(tmp_path, monkeypatch):
    def damaged(_folder):
        raise InputError("lacks a tensor")

    monkeypatch.setattr(packed, "read", damaged)
    with pytest.raises(ExportError, match="does not read back: lacks a tensor"):
        write(llama(), tmp_path / "packed")


def test_the_format_names_a_layout_where_there_are_ternary_codes(tmp_path):
    ternary, four_bits, dense = llama(), llama(), llama()
    convert(ternary)
    quantize(four_bits, RoundToNearest(bits=4, symmetric=True))
    signs = llama()
    convert(signs, BitLinear.from_linear)
    for model, name in ((ternary, "packed t5"), (four_bits, "packed"), (signs, "packed"), (dense, "packed")):
        assert write(model, tmp_path / str(id(model)), layout="t5").format == name


def test_every_module_read_is_in_evaluation_mode(tmp_path):
    model = llama()
    convert(model)
    loaded = read(write(model, tmp_path / "packed", rest="int8").path).model
    assert not any(module.training for module in loaded.modules())


def test_what_was_rounded_to_int8_can_be_written_again(tmp_path):
    model = llama()
    convert(model)
    first = read(write(model, tmp_path / "first", rest="int8").path).model
    again = read(write(first, tmp_path / "again").path).model
    ids = torch.arange(20)[None]
    assert torch.equal(logits(again, ids), logits(first, ids))
    assert isinstance(again.get_input_embeddings(), QuantizedEmbedding)
    assert not isinstance(again.get_output_embeddings(), nn.Embedding)
