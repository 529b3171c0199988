"""Packed Hugging Face folders: their bytes, what transformers makes of them, what is read back and what is refused."""

import errno
import functools
import json
from copy import deepcopy as copy_of
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from bitnet.errors import InputError
from bitnet.export import hf, hf_bitnet, hf_gate
from bitnet.export.hf import HuggingFaceExporter, read
from bitnet.export.protocol import ExportError
from bitnet.models import Size, from_directory, from_scratch
from bitnet.nn import BitLinear, BitLinear158, QuantizedLinear, bit_linears, convert, freeze, pack
from bitnet.quant import absmax, absmean_ternary

CLASSES = ["bitlinear", "autobitlinear"]


def tiny(body: str = "llama", *, tied: bool = False, feed_forward: int = 80) -> PreTrainedModel:
    size = Size(
        hidden_size=48,
        intermediate_size=feed_forward,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = from_scratch(body=body, size=size, vocab_size=128, hidden_act="silu")
    for name, parameter in model.named_parameters():
        if "norm" in name:  # norms of ones would hide one that gets lost
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def b158(**options) -> PreTrainedModel:
    model = tiny(**options)
    convert(model)
    return model


def frozen(**options) -> PreTrainedModel:
    model = b158(**options)
    freeze(model)
    return model


def biased() -> PreTrainedModel:
    config = copy_of(tiny().config)
    config.mlp_bias = True
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        nn.init.normal_(block.mlp.up_proj.bias)
    convert(model)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    token_ids = torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.eval()(input_ids=token_ids).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((found - expected).square().mean().sqrt() / spread)


def write(model: nn.Module, path: Path, weights: str, **options) -> Path:
    return HuggingFaceExporter(weights=weights, **options).write(model, None, path).path


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.qdata for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


@pytest.fixture
def load():
    with hf_gate.transformers_at_hand():
        yield functools.partial(AutoModelForCausalLM.from_pretrained, local_files_only=True)


def test_a_byte_holds_four_rows_a_quarter_of_the_matrix_apart():
    matrix = torch.randint(-1, 2, (12, 5), dtype=torch.int8)
    packed = hf_bitnet.pack_rows(matrix)
    for row in range(3):
        for column in range(5):
            byte = sum((int(matrix[row + 3 * place, column]) + 1) << 2 * place for place in range(4))
            assert int(packed[row, column]) == byte
    assert torch.equal(hf_bitnet.unpack_rows(packed), matrix)


def test_transformers_packs_the_same_bytes():
    with hf_gate.transformers_at_hand():
        from transformers.integrations.bitnet import pack_weights

        matrix = torch.randint(-1, 2, (16, 9), dtype=torch.int8)
        assert torch.equal(hf_bitnet.pack_rows(matrix), pack_weights(matrix.clone()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", CLASSES)
@pytest.mark.parametrize("make", [b158, frozen])
def test_codes_come_back_bit_for_bit_and_scales_as_documented(tmp_path, make, weights, tied):
    model = make(tied=tied)
    loaded = read(write(model, tmp_path / "out", weights))
    assert loaded.format == f"hf {weights}"
    if make is b158:
        freeze(model)
    found = codes(loaded.model)
    assert found.keys() == codes(model).keys()
    for name, expected in codes(model).items():
        layer, original = loaded.model.get_submodule(name), model.get_submodule(name)
        assert torch.equal(found[name], expected)
        scale, meant = layer.weight.scale, original.weight.scale
        assert bool((scale - meant).abs() <= hf_bitnet.SCALE_ROUNDING[weights] * meant)
        assert layer.activation is absmax
    assert relative(logits(loaded.model), logits(model)) < (1e-6 if weights == "autobitlinear" else 0.02)


@pytest.mark.parametrize("weights", CLASSES)
def test_transformers_answers_like_this_package(tmp_path, load, weights):
    model = b158(body="bitnet")
    loaded = load(write(model, tmp_path / "out", weights))
    assert relative(logits(loaded), logits(model)) < 0.02  # a few int8 codes; the wrong scale is off by 1 and more


def test_the_file_holds_the_inverse_for_one_class_and_the_scale_for_the_other(tmp_path):
    model = b158()
    name = "model.layers.1.mlp.down_proj"
    meant = absmean_ternary(model.get_submodule(name).weight).scale.reshape(1)
    stored = {}
    for weights in CLASSES:
        tensors = load_file(write(model, tmp_path / weights, weights) / "model.safetensors")
        stored[weights] = tensors[f"{name}.weight_scale"]
        assert tensors[f"{name}.weight"].dtype == torch.uint8
        assert tensors[f"{name}.weight"].shape == (12, 80)
    assert torch.equal(stored["autobitlinear"], meant)
    assert torch.equal(stored["bitlinear"], 1 / meant)


@pytest.mark.parametrize("weights", CLASSES)
def test_a_packed_model_and_one_of_16_bits_are_written_with_the_same_codes(tmp_path, weights):
    model = frozen()
    expected = codes(model)
    pack(model, "t5")
    for dtype in ("float32", "bfloat16"):
        found = read(write(model, tmp_path / dtype, weights, dtype=dtype)).model
        assert all(torch.equal(codes(found)[name], each) for name, each in expected.items())
        assert torch.equal(found.model.norm.weight, model.model.norm.weight.to(getattr(torch, dtype)).float())


def test_biases_are_kept_by_the_class_that_does_not_scale_them(tmp_path, load):
    model = biased()
    path = write(model, tmp_path / "out", "bitlinear")
    assert relative(logits(load(path)), logits(model)) < 0.02
    assert torch.equal(read(path).model.model.layers[0].mlp.up_proj.bias, model.model.layers[0].mlp.up_proj.bias)
    with pytest.raises(InputError, match=r"gate_proj and 5 more: autobitlinear would multiply its bias"):
        write(model, tmp_path / "other", "autobitlinear")
    model.config.mlp_bias = False
    with pytest.raises(InputError, match=r"mlp\.down_proj\.bias is \(48,\) and not there at all"):
        write(model, tmp_path / "other", "bitlinear")


def test_a_partly_converted_model_keeps_its_dense_linears(tmp_path, load):
    model = tiny()
    names = convert(model, include=("*.mlp.*",))
    path = write(model, tmp_path / "out", "bitlinear")
    assert set(codes(read(path).model)) == set(names)
    left = json.loads((path / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.0.self_attn.q_proj" in left
    assert "lm_head" in left


def test_latent_weights_are_read_as_the_frozen_model(tmp_path):
    model = b158()
    loaded = read(write(model, tmp_path / "out", "latent"))
    freeze(model)
    assert loaded.format == "hf latent"
    assert torch.equal(logits(loaded.model), logits(model))
    assert codes(loaded.model).keys() == codes(model).keys()


def test_dense_folders_are_read_as_they_are(tmp_path):
    model = tiny(tied=True)
    loaded = read(write(model, tmp_path / "out", "auto"))
    assert loaded.format == "hf dense"
    assert torch.equal(logits(loaded.model), logits(model))


def test_the_difference_that_dropping_the_activations_makes_is_reported(tmp_path):
    exported = HuggingFaceExporter(weights="dequantized").write(frozen(), None, tmp_path / "out")
    assert 1e-3 < exported.difference < 0.2
    assert exported.layers == 0


def test_what_was_written_is_reported(tmp_path):
    exported = HuggingFaceExporter(weights="autobitlinear").write(b158(), None, tmp_path / "out")
    assert (exported.format, exported.layers, exported.difference) == ("hf autobitlinear", 14, 0.0)
    assert exported.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert exported.runtime is not None
    assert exported.runtime.startswith("transformers 5")
    assert exported.runtime_difference is not None
    assert exported.runtime_difference < 0.02


MISFITS = {
    "b1": (BitLinear.from_linear, "no ternary codes"),
    "a scale a row": (
        functools.partial(BitLinear158.from_linear, quantizer=functools.partial(absmean_ternary, granularity="row")),
        "a scale for each row",
    ),
    "groups": (
        functools.partial(BitLinear158.from_linear, quantizer=functools.partial(absmean_ternary, granularity=16)),
        "no ternary codes with one scale",
    ),
    "4-bit activations": (
        functools.partial(BitLinear158.from_linear, activation=functools.partial(absmax, bits=4)),
        "inputs are not quantized as in b1.58",
    ),
}


@pytest.mark.parametrize("weights", ["latent", *CLASSES])
@pytest.mark.parametrize(("make", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_what_the_format_cannot_carry_is_said_before_any_work(tmp_path, weights, make, message):
    model = tiny()
    convert(model, make)
    (problem,) = [each for each in HuggingFaceExporter(weights=weights).problems(model) if "and 13 more" in each][:1]
    if weights != "latent":
        assert message in " ".join(HuggingFaceExporter(weights=weights).problems(model))
    assert "use weights=dequantized" in problem
    with pytest.raises(InputError, match="cannot carry this model"):
        write(model, tmp_path / "out", weights)
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_divide_by_four_are_named(tmp_path):
    problems = HuggingFaceExporter(weights="bitlinear").problems(b158(feed_forward=78))
    assert problems == [
        "model.layers.0.mlp.gate_proj and 3 more: out_features must be a multiple of 4, got 78: leave the layer dense "
        "(exclude=) or use weights=dequantized"
    ]


def test_latent_weights_are_not_rounded_to_16_bits():
    (problem,) = HuggingFaceExporter(dtype="bfloat16").problems(b158())
    assert "latent weights rounded to bfloat16 have other codes" in problem
    (problem,) = HuggingFaceExporter(weights="latent").problems(frozen())
    assert "has no latent weight" in problem
    assert HuggingFaceExporter(weights="bitlinear").problems(tiny()) == [
        "no layer is quantized: use weights=auto, which writes it as it is"
    ]


@pytest.mark.parametrize("options", [{"weights": "packed"}, {"dtype": "int8"}])
def test_options_that_do_not_exist_are_refused(options):
    with pytest.raises(InputError, match="must be one of"):
        HuggingFaceExporter(**options)


NAME = "model.layers.1.mlp.down_proj"
DAMAGE = {
    "no weight": ({f"{NAME}.weight": None}, rf"lacks the tensor {NAME}\.weight"),
    "no scale": ({f"{NAME}.weight_scale": None}, rf"lacks the tensor {NAME}\.weight_scale"),
    "no norm": ({"model.norm.weight": None}, r"lacks the tensor model\.norm\.weight"),
    "one too many": ({f"{NAME}.extra": torch.ones(1)}, rf"has no place for: {NAME}\.extra"),
    "other shape": ({f"{NAME}.weight": torch.ones(12, 40, dtype=torch.uint8)}, r"to be uint8 \[12, 80\], got"),
    "not packed": ({f"{NAME}.weight": torch.randn(48, 80)}, r"to be uint8 \[12, 80\], got float32 \[48, 80\]"),
    "code 3": ({f"{NAME}.weight": torch.full((12, 80), 0b11_00_01_10, dtype=torch.uint8)}, rf"{NAME}: .*the code 3"),
    "scale 0": ({f"{NAME}.weight_scale": torch.zeros(1)}, rf"{NAME}\.weight_scale: expected a positive scale"),
    "scale < 0": ({f"{NAME}.weight_scale": -torch.ones(1)}, rf"{NAME}\.weight_scale: expected a positive scale"),
    "scale NaN": ({f"{NAME}.weight_scale": torch.full((1,), torch.nan)}, rf"{NAME}\.weight_scale holds NaN"),
    "scale a row": ({f"{NAME}.weight_scale": torch.ones(48)}, r"to be floating \[1\], got float32 \[48\]"),
    "NaN norm": ({"model.norm.weight": torch.full((48,), torch.nan)}, r"model\.norm\.weight holds NaN"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """A whole folder of either class; tests work on copies."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("whole"), b158()
    return {weights: write(model, folder / weights, weights) for weights in CLASSES}


def copy(source: Path, target: Path, tensors: dict[str, torch.Tensor | None], **config) -> Path:
    """A folder with some tensors replaced (None: left out) and some entries of its quantization_config changed."""
    target.mkdir()
    values = {**load_file(source / "model.safetensors"), **tensors}
    save_file({name: each for name, each in values.items() if each is not None}, target / "model.safetensors")
    entries = json.loads((source / "config.json").read_text())
    entries["quantization_config"].update(config)
    (target / "config.json").write_text(json.dumps(entries))
    return target


@pytest.mark.parametrize(("tensors", "message"), DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("weights", CLASSES)
def test_a_damaged_folder_is_refused_and_the_tensor_named(tmp_path, whole, weights, tensors, message):
    with pytest.raises(InputError, match=message):
        read(copy(whole[weights], tmp_path / "copy", tensors))


@pytest.mark.parametrize(("weights", "claimed"), [CLASSES, CLASSES[::-1]])
def test_a_scale_that_looks_inverted_is_refused(tmp_path, whole, weights, claimed):
    """transformers loads it, and every weight is off by 1/m^2."""
    path = copy(whole[weights], tmp_path / "copy", {}, linear_class=claimed)
    if weights == "autobitlinear":  # m taken for 1/m
        with pytest.raises(InputError, match=r"weight_scale: bitlinear divides by .* looks like the inverse"):
            read(path)
    else:
        with pytest.raises(InputError, match=r"weight_scale: autobitlinear multiplies by .* looks like the inverse"):
            read(path)


def test_a_folder_without_linear_class_and_with_bfloat16_scales_is_read_like_transformers_does(tmp_path, whole):
    """The layout that others publish: bf16 everywhere, no list of what stays dense, a tied head."""
    source = whole["bitlinear"]
    tensors = load_file(source / "model.safetensors")
    narrow = {name: each.bfloat16() for name, each in tensors.items() if each.is_floating_point()}
    path = copy(source, tmp_path / "copy", {**narrow, "lm_head.weight": None}, modules_to_not_convert=None)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]["linear_class"]
    config.update(tie_word_embeddings=True, dtype="bfloat16")
    (path / "config.json").write_text(json.dumps(config))
    loaded = read(path).model
    layer = loaded.get_submodule(NAME)
    assert torch.equal(layer.weight.scale.reshape(1), 1 / narrow[f"{NAME}.weight_scale"].float())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.dtype == torch.float32
    assert torch.isfinite(logits(loaded)).all()


@pytest.mark.parametrize("keep", [0, 7, 200, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, whole, keep):
    path = copy(whole["bitlinear"], tmp_path / "copy", {})
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(InputError, match="no whole safetensors file"):
        read(path)


def test_an_oversized_header_and_a_foreign_file_are_refused(tmp_path, whole):
    path = copy(whole["bitlinear"], tmp_path / "copy", {})
    for content in ((2**60).to_bytes(8, "little") + b"{}", b"GGUF" + bytes(64), b"\x80\x04K\x01." * 20):
        (path / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="no whole safetensors file"):
            read(path)


CONFIGS = [
    ({"num_hidden_layers": 10**9}, r"has 1000000000 layers"),
    ({"model_type": "no-such"}, "no-such"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantized with 'awq'"),
    ({"quantization_config": {"quant_method": "bitnet", "linear_class": "os.system"}}, "linear_class must be"),
    ({"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": "lm_head"}}, "list of names"),
    ({"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}}, "norm inside each linear"),
    ({"quantization_config": ["bitnet"]}, "json object"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_a_config_that_does_not_fit_is_refused(tmp_path, whole, changes, message):
    path = copy(whole["bitlinear"], tmp_path / "copy", {})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=message):
        read(path)


def test_a_config_cannot_name_code_or_files_elsewhere(tmp_path, whole):
    path = copy(whole["bitlinear"], tmp_path / "copy", {})
    (path / "evil.py").write_text("open('executed', 'w')\nclass Evil: pass\n")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (path / "config.json").write_text(json.dumps(config))
    read(path)  # the class that transformers itself has for this model_type
    assert not Path("executed").exists()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(InputError, match="expected safetensors files beside it"):
        read(path)


def test_a_sharded_folder_is_read_like_a_whole_one(tmp_path, whole):
    path = copy(whole["autobitlinear"], tmp_path / "copy", {})
    expected = logits(read(path).model)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, path / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(read(path).model), expected)
    (path / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks model-2\.safetensors"):
        read(path)


def test_training_on_packed_weights_is_refused_and_says_what_to_do(whole):
    with pytest.raises(InputError, match=r"cannot be trained.*read it with bitnet\.export\.load"):
        from_directory(whole["bitlinear"])


@pytest.mark.parametrize("what", ["code", "scale", "norm"])
def test_one_changed_value_is_noticed_before_the_folder_gets_its_name(tmp_path, monkeypatch, what):
    original = hf._stored

    def changed(*arguments):
        for name, tensor in original(*arguments):
            if what == "code" and name == f"{NAME}.weight":
                tensor[0, 0] ^= 1
            if what == "scale" and name == f"{NAME}.weight_scale":
                tensor = torch.nextafter(tensor, torch.tensor(9.0))
            if what == "norm" and name == "model.norm.weight":
                tensor = torch.nextafter(tensor, torch.tensor(9.0))
            yield name, tensor

    monkeypatch.setattr(hf, "_stored", changed)
    with pytest.raises(ExportError, match=r"read back|code 3"):
        write(frozen(), tmp_path / "out", "autobitlinear")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [hf, hf_gate])
def test_a_full_disk_or_a_kill_leaves_nothing_under_the_final_name(tmp_path, monkeypatch, module: ModuleType):
    def stop(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device") if module is hf else KeyboardInterrupt

    monkeypatch.setattr(module, "model_card" if module is hf else "read", stop)
    with pytest.raises((OSError, KeyboardInterrupt)):
        write(b158(), tmp_path / "out", "bitlinear")
    assert not list(tmp_path.iterdir())


def test_stored_bits_are_two_a_weight(tmp_path):
    path = write(b158(), tmp_path / "out", "bitlinear")
    with safe_open(path / "model.safetensors", framework="pt") as file:
        packed = [file.get_tensor(name) for name in file.keys() if name.endswith("_proj.weight")]  # noqa: SIM118
    weights = sum(layer.weight.numel() for _, layer in bit_linears(b158()))
    assert sum(each.numel() for each in packed) * 8 == 2 * weights


@pytest.mark.parametrize("weights", ["bitlinear", "autobitlinear"])
def test_a_scale_that_a_reader_would_take_for_its_inverse_is_refused_before_any_work(tmp_path, weights):
    model = b158()
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1e4)
    with pytest.raises(InputError, match=r"up_proj: its scale lies outside 9e-06 to 16.*weights=dequantized"):
        write(model, tmp_path / "out", weights)
    assert not list(tmp_path.iterdir())
