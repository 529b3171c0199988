"""The folder of our own holds every quantized weight, gives it back to the bit, and refuses what was changed."""

import errno
import functools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from bitnet.errors import InputError
from bitnet.evaluation import footprint
from bitnet.export import ExportError, PackedExporter, packed, packed_read
from bitnet.export.packed_read import read
from bitnet.models import Size, from_scratch
from bitnet.nn import BitLinear, BitLinear158, PackedLinear, QuantizedEmbedding, QuantizedLinear, convert, freeze, pack
from bitnet.ptq import GPTQ, PBLLM, BiLLM, Driver, KQuant, RoundToNearest, quantize
from bitnet.ptq.bitsandbytes import BitsAndBytes4Bit, LLMInt8
from bitnet.quant import StaticActivation, absmax, absmean_ternary, zero_point


def tiny(body: str = "bitnet", *, tied: bool = False, hidden: int = 48) -> PreTrainedModel:
    size = Size(
        hidden_size=hidden,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = from_scratch(body=body, size=size, vocab_size=128, hidden_act="relu2" if body == "bitnet" else "silu")
    for name, parameter in model.named_parameters():
        if "norm" in name:  # norms of ones would hide one that gets lost
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def b158(**options) -> PreTrainedModel:
    model = tiny(**options)
    convert(model)
    return model


def answers(model: nn.Module) -> torch.Tensor:
    token_ids = torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=token_ids).logits


def write(model: nn.Module, path: Path, **options) -> Path:
    return PackedExporter(**options).write(model, None, path).path


def quantized(method, **options) -> PreTrainedModel:
    model = tiny("llama")
    text = torch.randint(128, (4, 32), generator=torch.Generator().manual_seed(1))
    quantize(model, method, text, driver=Driver(**options) if options else None)
    return model


@pytest.mark.parametrize("layout", ["i2", "t5"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("state", ["trained", "frozen", "packed"])
def test_a_ternary_model_comes_back_with_the_same_answers(tmp_path, layout, tied, state):
    model = b158(tied=tied)
    expected = answers(model)
    if state != "trained":
        freeze(model)
    if state == "packed":
        pack(model, "t5")
    loaded = read(write(model, tmp_path / "packed", layout=layout)).model
    assert torch.equal(answers(loaded), expected)
    layers = [layer for layer in loaded.modules() if isinstance(layer, PackedLinear)]
    assert len(layers) == 14
    assert {layer.weight.layout for layer in layers} == {layout}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert tied == (loaded.lm_head.weight is loaded.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "layer",
    [
        BitLinear.from_linear,
        functools.partial(BitLinear158.from_linear, quantizer=functools.partial(absmean_ternary, granularity="row")),
        functools.partial(BitLinear158.from_linear, quantizer=functools.partial(absmean_ternary, granularity=20)),
        functools.partial(BitLinear158.from_linear, activation=functools.partial(absmax, bits=4)),
        functools.partial(BitLinear158.from_linear, activation=zero_point),
    ],
    ids=["signs", "row scales", "group scales", "4-bit inputs", "zero-point inputs"],
)
def test_every_kind_of_trained_layer_comes_back(tmp_path, layer):
    model = tiny()
    convert(model, layer)
    loaded = read(write(model, tmp_path / "packed")).model
    assert torch.equal(answers(loaded), answers(model))


METHODS = {
    "gptq 4 bits": lambda: quantized(GPTQ(bits=4, granularity=16)),
    "rtn 3 bits, symmetric": lambda: quantized(RoundToNearest(bits=3, symmetric=True)),
    "rtn 2 bits": lambda: quantized(RoundToNearest(bits=2, symmetric=False)),
    "k-quant": lambda: quantized(KQuant(type="Q4_K")),
    "billm": lambda: quantized(BiLLM()),
    "pb-llm": lambda: quantized(PBLLM()),
    "nf4, nested": lambda: quantized(BitsAndBytes4Bit(double_quant=True)),
    "llm.int8": lambda: quantized(LLMInt8()),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_post_training_result_comes_back(tmp_path, method):
    model = METHODS[method]()
    path = write(model, tmp_path / "packed")
    loaded = read(path).model
    assert torch.equal(answers(loaded), answers(model))
    stored = {layer.name: layer.bits for layer in footprint(loaded).layers}
    counted = {layer.name: layer.bits for layer in footprint(model).layers}
    assert stored == counted


def test_static_activations_come_back(tmp_path):
    model = tiny("llama")
    text = torch.randint(128, (4, 32), generator=torch.Generator().manual_seed(1))
    quantize(model, RoundToNearest(bits=8, symmetric=True), text, activation=StaticActivation(bits=8))
    loaded = read(write(model, tmp_path / "packed")).model
    assert torch.equal(answers(loaded), answers(model))


def test_layers_of_gpt2_come_back(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    quantize(model, RoundToNearest(bits=4, symmetric=False))
    loaded = read(write(model, tmp_path / "packed")).model
    assert torch.equal(answers(loaded), answers(model))


def test_a_dense_model_comes_back_too(tmp_path):
    model = tiny()
    loaded = read(write(model, tmp_path / "packed")).model
    assert torch.equal(answers(loaded), answers(model))


@pytest.mark.parametrize(("layout", "bits"), [("i2", 2.0), ("t5", 1.6)])
def test_codes_take_the_bytes_that_theory_says(tmp_path, layout, bits):
    model = b158(hidden=240)
    path = write(model, tmp_path / "packed", layout=layout)
    tensors = load_file(path / "model.safetensors")
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, BitLinear158))
    stored = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(".packed"))
    assert stored * 8 / weights == pytest.approx(bits, rel=0.01)


def test_the_rest_is_narrowed_only_where_nothing_is_lost(tmp_path):
    model = b158()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.bfloat16())
    tensors = load_file(write(model, tmp_path / "packed") / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_in_int8_are_a_byte_a_weight(tmp_path, tied):
    model = b158(tied=tied)
    written = PackedExporter(rest="int8").write(model, None, tmp_path / "packed")
    assert 0 < written.difference < 0.25
    loaded = read(written.path).model
    assert isinstance(loaded.model.embed_tokens, QuantizedEmbedding)
    assert isinstance(loaded.lm_head, QuantizedLinear)
    tensors = load_file(written.path / "model.safetensors")
    assert tensors["model.embed_tokens.codes"].shape == (128, 48)
    assert ("lm_head.codes" in tensors) == (not tied)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(absmax(model.model.embed_tokens.weight).dequantize())
        if not tied:
            model.lm_head.weight.copy_(absmax(model.lm_head.weight).dequantize())
    torch.testing.assert_close(answers(loaded), answers(model))


def test_a_rounded_rest_is_told_in_the_difference(tmp_path):
    written = PackedExporter(rest="bfloat16").write(b158(), None, tmp_path / "packed")
    assert 0 < written.difference < 0.25


def test_the_record_of_the_run_is_kept(tmp_path):
    PackedExporter().write(b158(), None, tmp_path / "packed", {"perplexity": 12.5, "command": "python train.py"})
    assert read(tmp_path / "packed").record == {"perplexity": 12.5, "command": "python train.py"}
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "| perplexity | 12.500 |" in card
    assert "bitnet.load" in card
    assert "library_name" not in card


def test_an_activation_of_ones_own_is_refused_before_any_work(tmp_path):
    model = tiny()
    convert(model, functools.partial(BitLinear158.from_linear, activation=lambda x: absmax(x)))
    with pytest.raises(InputError, match="which no file can name: use one of absmax"):
        write(model, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "packed").mkdir()
    with pytest.raises(InputError, match="exists already"):
        write(b158(), tmp_path / "packed")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packed, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        write(b158(), tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_codes_that_do_not_read_back_fail_the_export_and_leave_nothing(tmp_path, monkeypatch):
    model = b158()
    honest = packed.store_weight

    def wrong(weight, layout):
        stored = honest(weight, layout)
        stored.tensors["packed"][0, 0] ^= 1
        return stored

    monkeypatch.setattr(packed, "store_weight", wrong)
    with pytest.raises((ExportError, InputError), match=r"q_proj.*(not those that were written|damaged)"):
        write(model, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path):
    return write(b158(), tmp_path / "packed")


def change(folder: Path, edit) -> None:
    """Rewrite the manifest after ``edit`` of it, as someone who knows its checksum, too."""
    manifest = json.loads((folder / "bitnet.json").read_text())
    edit(manifest)
    manifest["checksum"] = packed_read.checksum(manifest)
    (folder / "bitnet.json").write_text(json.dumps(manifest))


def rewrite(folder: Path, edit) -> None:
    """Rewrite the tensors after ``edit`` of them, as someone who knows the checksums, too."""
    import zlib

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    sums = {name: zlib.crc32(each.reshape(-1).view(torch.uint8).numpy().data) for name, each in tensors.items()}
    change(folder, lambda manifest: manifest.update(checksums=sums))


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{Q}.scale"), "lacks model.layers.0.self_attn.q_proj.scale"),
        (lambda t: t.update(extra=torch.zeros(3)), "holds extra, which the model has no place for"),
        (lambda t: t.update({f"{Q}.packed": torch.zeros(48, 5, dtype=torch.uint8)}), "48 columns take 12 bytes"),
        (lambda t: t.update({f"{Q}.packed": torch.zeros(44, 12, dtype=torch.uint8)}), r"the file \[44, 48\]"),
        (lambda t: t[f"{Q}.packed"].fill_(0xFF), "damaged or of another layout"),
        (lambda t: t[f"{Q}.scale"].zero_(), "positive and finite"),
        (lambda t: t[f"{Q}.scale"].neg_(), "positive and finite"),
        (lambda t: t[f"{Q}.scale"].fill_(float("nan")), "positive and finite"),
        (lambda t: t["lm_head.weight"].fill_(float("inf")), "lm_head.weight holds NaN or infinity"),
        (lambda t: t.update({"model.norm.weight": torch.ones(47)}), r"model.norm.weight is \[47\]"),
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(folder, edit, message):
    rewrite(folder, edit)
    with pytest.raises(InputError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=1), "of version 1, this package reads version 2"),
        (lambda m: m.update(format="other"), "no description of a packed folder"),
        (lambda m: m.pop("layers"), "has no layers"),
        (lambda m: m["config"].update(model_type="os.system"), "no causal language model of type"),
        (lambda m: m["config"].update(hidden_size=-1), "no causal language model|the model"),
        (lambda m: m["layers"][Q]["weight"].update(**{"class": "os:system"}), "which this version does not have"),
        (lambda m: m["layers"][Q]["weight"].update(**{"class": "bitnet.files:atomic_directory"}), "does not have"),
        (lambda m: m["layers"][Q]["weight"].update(**{"class": "bitnet.quant.grid:pathlib"}), "does not have"),
        (lambda m: m["layers"][Q]["weight"].update(layout="i3"), "layout must be one of"),
        (lambda m: m["layers"][Q]["weight"].update(surplus=1), "too many or missing: surplus"),
        (lambda m: m["layers"][Q]["activation"].update(**{"class": "eval"}), "does not have"),
        (lambda m: m["layers"][Q].update(activation={"class": "absmax", "bits": 77}), "bits must be 2 to 8"),
        (lambda m: m["layers"].update(nowhere=m["layers"].pop(Q)), "nowhere"),
        (lambda m: m["checksums"].popitem(), "do not belong together"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(folder, edit, message):
    change(folder, edit)
    with pytest.raises(InputError, match=message):
        read(folder)


def test_a_flipped_bit_is_found(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="not those that were written: the file is damaged"):
        read(folder)


@pytest.mark.parametrize("kept", [0, 7, 500, -1])
def test_a_truncated_file_is_refused(folder, kept):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:kept])
    with pytest.raises(InputError, match="no whole safetensors file"):
        read(folder)


def test_a_header_of_absurd_length_is_refused(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + content[8:])
    with pytest.raises(InputError, match="no whole safetensors file"):
        read(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\x00\xff"])
def test_a_manifest_that_is_no_manifest_is_refused(folder, content):
    (folder / "bitnet.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"cannot be read|no description"):
        read(folder)


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a packed folder"):
        read(tmp_path)
