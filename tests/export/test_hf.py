import errno
import functools
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from bitnet.errors import InputError
from bitnet.export import hf
from bitnet.export.hf import HuggingFaceExporter, contents
from bitnet.export.hf_gate import transformers_at_hand
from bitnet.export.protocol import ExportError
from bitnet.models import Size, from_directory, from_scratch
from bitnet.nn import BitLinear, BitLinear158, bit_linears, convert, freeze
from bitnet.ptq import Driver, RoundToNearest, quantize
from bitnet.quant import absmax, absmean_ternary, centred_sign

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's compiler uses what torch has deprecated
    from transformers.integrations.bitnet import AutoBitLinear, WeightQuant

BODIES = [("bitnet", "relu2"), ("llama", "silu")]


def tiny(body: str = "bitnet", act: str = "relu2", *, tied: bool = False) -> PreTrainedModel:
    size = Size(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = from_scratch(body=body, size=size, vocab_size=128, hidden_act=act)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # norms of ones would hide one that gets lost
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def b158(body: str = "bitnet", act: str = "relu2", **options) -> PreTrainedModel:
    model = tiny(body, act, **options)
    convert(model)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    token_ids = torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.eval()(input_ids=token_ids).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((found - expected).square().mean().sqrt() / spread)


def write(model: nn.Module, directory: Path) -> Path:
    return HuggingFaceExporter().write(model, None, directory).path


@pytest.fixture
def load():
    """transformers alone, as in the gate: uncompiled, and without accelerate where that is missing."""
    with transformers_at_hand():
        yield functools.partial(AutoModelForCausalLM.from_pretrained, local_files_only=True)


@pytest.mark.parametrize(("body", "act"), BODIES)
def test_a_dense_model_comes_back_bit_for_bit(tmp_path, load, body, act):
    model = tiny(body, act)
    loaded = load(write(model, tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("body", "act"), BODIES)
def test_a_158_bit_model_loads_as_quantized_layers_over_the_latent_weights(tmp_path, load, body, act, tied):
    model = b158(body, act, tied=tied)
    loaded = load(write(model, tmp_path / "out"))
    quantized = {name for name, module in loaded.named_modules() if isinstance(module, AutoBitLinear)}
    assert quantized == {name for name, _ in bit_linears(model)}
    assert all(module.online_quant for module in loaded.modules() if isinstance(module, AutoBitLinear))
    found = loaded.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    assert relative(logits(loaded), logits(model)) < 0.02  # a few int8 codes; an unquantized model is off by 0.5 to 1


def test_the_config_tells_transformers_to_quantize_all_but_the_head(tmp_path):
    config = json.loads((write(b158(), tmp_path / "out") / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "modules_to_not_convert": ["lm_head"],
    }
    assert config["architectures"] == ["BitNetForCausalLM"]


def test_a_partly_converted_model_quantizes_the_same_layers_in_transformers(tmp_path, load):
    model = tiny()
    names = convert(model, include=("*.mlp.*",))
    loaded = load(write(model, tmp_path / "out"))
    assert [name for name, module in loaded.named_modules() if isinstance(module, AutoBitLinear)] == names


def test_transformers_codes_differ_from_ours_only_next_to_a_rounding_boundary():
    weight = torch.randn(1024, 1024) * 0.02
    ours = absmean_ternary(weight)
    with torch.compiler.set_stance("force_eager"):
        theirs = (WeightQuant.apply(weight) / ours.scale).round()
    differing = ours.qdata != theirs
    to_boundary = ((weight / ours.scale).abs() - 0.5).abs()
    assert differing.sum() <= 10
    assert bool((to_boundary[differing] < 1e-6).all())


def test_a_158_bit_folder_can_be_trained_on_in_transformers(tmp_path, load):
    loaded = load(write(b158(), tmp_path / "out")).train()
    token_ids = torch.randint(128, (2, 16))
    loaded(input_ids=token_ids, labels=token_ids).loss.backward()
    layers = [module for module in loaded.modules() if isinstance(module, AutoBitLinear)]
    assert all(layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0 for layer in layers)


def test_a_158_bit_folder_read_by_this_package_answers_bit_for_bit(tmp_path):
    model = b158()
    again = from_directory(write(model, tmp_path / "out"))
    convert(again)
    assert torch.equal(logits(again), logits(model))


OTHERS = {
    "b1": BitLinear.from_linear,
    "one scale a row": functools.partial(
        BitLinear158.from_linear, quantizer=functools.partial(absmean_ternary, granularity="row")
    ),
    "one scale a group": functools.partial(
        BitLinear158.from_linear, quantizer=functools.partial(absmean_ternary, granularity=16)
    ),
    "4-bit activations": functools.partial(BitLinear158.from_linear, activation=functools.partial(absmax, bits=4)),
    "other clamp": functools.partial(BitLinear158.from_linear, activation=functools.partial(absmax, eps=1e-2)),
    "signs": functools.partial(BitLinear158.from_linear, quantizer=centred_sign),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_what_transformers_cannot_compute_is_written_as_exact_values_and_said_so(tmp_path, load, make):
    model = tiny()
    convert(model, make)
    written = HuggingFaceExporter().write(model, None, tmp_path / "out")
    directory, card = written.path, (written.path / "README.md").read_text()
    assert "activations are not quantized here" in written.contents
    assert "activations are not quantized here" in card
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    loaded = load(directory)
    for name, layer in bit_linears(model):
        assert torch.equal(loaded.get_submodule(name).weight, layer.quantized_weight().dequantize())


def test_a_frozen_model_is_written_as_packed_codes_by_itself(tmp_path):
    model = b158()
    freeze(model)
    assert contents(model) == "bitlinear"
    assert HuggingFaceExporter().write(model, None, tmp_path / "out").format == "hf bitlinear"


def test_a_frozen_model_can_be_written_as_the_values_of_its_codes(tmp_path, load):
    model = b158()
    expected = {name: layer.quantized_weight().dequantize() for name, layer in bit_linears(model)}
    freeze(model)
    loaded = load(HuggingFaceExporter(weights="dequantized").write(model, None, tmp_path / "out").path)
    for name, weight in expected.items():
        assert torch.equal(loaded.get_submodule(name).weight, weight)


@pytest.mark.parametrize("frozen", [False, True])
def test_writing_leaves_the_model_as_it_was(tmp_path, frozen):
    model = b158()
    if frozen:
        freeze(model)
    before = [(name, type(module)) for name, module in model.named_modules()]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    write(model, tmp_path / "out")
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert model.training


def test_the_gate_changes_no_setting_of_transformers(tmp_path):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    write(b158(), tmp_path / "out")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_the_tokenizer_in_the_folder_gives_the_same_ids(tmp_path):
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "one", "two", "three"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    directory = HuggingFaceExporter().write(b158(), tokenizer, tmp_path / "out").path
    again = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert again("two one four three")["input_ids"] == tokenizer("two one four three")["input_ids"] == [4, 3, 0, 5]
    assert (again.bos_token, again.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, value):
    model = b158()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        write(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        write(b158(), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_module_that_is_no_transformers_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a transformers model"):
        write(nn.Linear(4, 4), tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(path: Path, *_) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        write(b158(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def damage_config(**changes):
    """A writer of the configuration that gets something wrong."""

    def declare(config_file: Path, kind: str, left_dense: list[str]) -> None:
        ORIGINAL_DECLARE(config_file, kind, left_dense)
        config = json.loads(config_file.read_text())
        config_file.write_text(json.dumps({**config, **changes}))

    return declare


ORIGINAL_DECLARE = hf._declare


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda config_file, kind, left_dense: None, "other layers are quantized in what was read back"),
        (damage_config(num_hidden_layers=1), "no place for|lacks"),
        (damage_config(num_hidden_layers=3), "lacks"),
        (damage_config(hidden_act="silu"), "other logits"),
        (damage_config(rms_norm_eps=2e-5), "with this package.s layers, gives other logits"),
    ],
    ids=["not declared", "fewer layers", "more layers", "another activation", "another epsilon"],
)
def test_a_folder_that_gives_another_model_back_is_refused_and_removed(tmp_path, monkeypatch, declare, message):
    monkeypatch.setattr(hf, "_declare", declare)
    with pytest.raises(ExportError, match=message):
        write(b158(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_changed_bit_of_a_weight_is_noticed(tmp_path, monkeypatch):
    def declare(config_file: Path, kind: str, left_dense: list[str]) -> None:
        ORIGINAL_DECLARE(config_file, kind, left_dense)
        weights = bytearray((config_file.parent / "model.safetensors").read_bytes())
        weights[-4] ^= 1
        (config_file.parent / "model.safetensors").write_bytes(weights)

    monkeypatch.setattr(hf, "_declare", declare)
    with pytest.raises(ExportError, match="other values of"):
        write(b158(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_with_a_part_that_transformers_does_not_know_is_refused(tmp_path):
    model = b158("llama", "silu")
    model.model.layers[0].mlp.extra_norm = nn.RMSNorm(80)
    with pytest.raises(InputError, match="extra_norm"):
        write(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_post_training_results_are_written_as_their_exact_values(kind, tmp_path):
    """Fused Conv1D layers with biases (GPT-2), a quantized embedding and head (Llama)."""
    torch.manual_seed(0)
    if kind == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2))
    else:
        model = tiny("llama", "silu")
    quantize(
        model.eval(), RoundToNearest(symmetric=True), driver=Driver(embeddings=kind == "llama", head=kind == "llama")
    )
    assert contents(model) == "dequantized"
    HuggingFaceExporter().write(model, None, tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.randint(128, (2, 9))
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("make", [tiny, b158])
def test_how_the_model_generates_survives_whatever_transformers_thinks_of_it(make, tmp_path):
    model = make()
    model.generation_config = GenerationConfig(temperature=0.6, eos_token_id=[1, 7])  # without do_sample
    found = hf.read(write(model, tmp_path / "out")).model.generation_config
    assert (found.temperature, found.eos_token_id) == (0.6, [1, 7])


@pytest.mark.parametrize("text", ["[1]", "{", '{"watermarking_config": 3}'])
def test_damaged_generation_settings_are_refused(text, tmp_path):
    for model in (tiny(), b158()):
        path = write(model, tmp_path / type(model.model.layers[0].mlp.up_proj).__name__)
        (path / "generation_config.json").write_text(text)
        with pytest.raises(InputError, match=r"generation_config\.json"):
            hf.read(path)


def only_a_body() -> PreTrainedModel:
    return tiny("llama", "silu").model


def pruned() -> PreTrainedModel:
    model = b158("llama", "silu")
    model.model.layers = model.model.layers[:1]
    return model


def classifier() -> PreTrainedModel:
    config = tiny("llama", "silu").config
    config.pad_token_id = 0
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (only_a_body, "a LlamaModel"),
        (pruned, r"layers\.1\..* and not|layers\.1\..* is missing"),
        (classifier, "a LlamaForSequenceClassification"),
    ],
)
def test_a_body_that_its_config_does_not_describe_is_refused_before_any_work(make, match, tmp_path):
    with pytest.raises(InputError, match=match):
        write(make(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_head_tied_by_hand_is_stored_beside_the_embedding(tmp_path, load):
    model = tiny("llama", "silu")
    model.lm_head.weight = model.model.embed_tokens.weight
    path = write(model, tmp_path / "out")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= load_file(path / "model.safetensors").keys()
    assert torch.equal(logits(load(path)), logits(model))


def vocabulary(entries: int) -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(entries)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused_with_the_model():
    assert HuggingFaceExporter().problems(b158(), vocabulary(128)) == []
    [problem] = HuggingFaceExporter().problems(b158(), vocabulary(129))
    assert "the token id 128, and the model 128 embeddings" in problem


def edit(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module", params=[tiny, b158])
def written(request, tmp_path_factory):
    """A good folder and its logits."""
    path = write(request.param(), tmp_path_factory.mktemp("good") / "out")
    return path, logits(hf.read(path).model)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 300000},
        {"num_hidden_layers": 10**30},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": None},
        {"num_hidden_layers": 2.5},
        {"num_attention_heads": 0},
        {"num_attention_heads": "x"},
        {"head_dim": 10**30},
        {"hidden_size": [1]},
        {"dtype": [1]},
        {"dtype": "float1"},
        {"vocab_size": -1},
        {"pad_token_id": 1000},
        {"rope_parameters": [1]},
        {"rms_norm_eps": "x"},
        {"hidden_act": 3},
        {"model_type": [1]},
        {"architectures": 3},
    ],
)
def test_a_damaged_config_is_an_input_error_or_harmless(written, changes, tmp_path):
    good, expected = written
    shutil.copytree(good, tmp_path / "out")
    edit(tmp_path / "out", **changes)
    try:
        found = logits(hf.read(tmp_path / "out").model)
    except InputError:
        assert "architectures" not in changes
        return
    assert changes == {"architectures": 3}  # which nobody reads
    assert torch.equal(found, expected)
