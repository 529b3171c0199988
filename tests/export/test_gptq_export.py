"""GPTQ checkpoints: their words against a loop from the format's definition, the round trip, and what is refused."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bitnet.errors import InputError
from bitnet.export import gptq
from bitnet.export.gptq import GPTQExporter, read
from bitnet.export.gptq_layout import from_tensors, pack_words, to_tensors, unpack_words
from bitnet.export.protocol import ExportError
from bitnet.models import Size, from_directory, from_scratch
from bitnet.nn import QuantizedLinear, convert, freeze
from bitnet.ptq import HQQ, Driver, RoundToNearest, quantize
from bitnet.quant import QTensor, absmax

BITS = [2, 3, 4, 8]


def tiny(*, tied: bool = False, feed_forward: int = 96) -> PreTrainedModel:
    size = Size(
        hidden_size=64,
        intermediate_size=feed_forward,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return from_scratch(body="llama", size=size, vocab_size=128, hidden_act="silu").eval()


def quantized(bits: int = 4, *, symmetric: bool = False, granularity: str | int = 32, **options) -> PreTrainedModel:
    model, exclude = tiny(), options.pop("exclude", ())
    method = RoundToNearest(bits=bits, symmetric=symmetric, granularity=granularity, **options)
    quantize(model, method, driver=Driver(exclude=exclude))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    token_ids = torch.randint(128, (3, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.eval()(input_ids=token_ids).logits


def layers(model: nn.Module) -> dict[str, QTensor]:
    return {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def write(model: nn.Module, path: Path, **options) -> Path:
    return GPTQExporter(**options).write(model, None, path).path


def random_weight(bits: int, *, symmetric: bool, rows: int = 64, columns: int = 96, size: int | None = 32) -> QTensor:
    middle, groups = 2 ** (bits - 1), 1 if size is None else columns // size
    low = -middle + symmetric
    codes = torch.randint(low, middle, (rows, columns), dtype=torch.int8)
    zero = None if symmetric else torch.randint(1 - middle, middle, (rows, groups), dtype=torch.int8)
    return QTensor(codes, torch.rand(rows, groups).half() + 0.01, 2**bits - symmetric, zero, size)


def bits_at(words: list[int], start: int, count: int) -> int:
    """Bits of a stream of 32-bit words, the lowest bit of the first word first."""
    value = 0
    for place in range(count):
        word, bit = divmod(start + place, 32)
        value |= ((words[word] & 0xFFFFFFFF) >> bit & 1) << place
    return value


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", BITS)
def test_words_hold_the_codes_where_the_definition_puts_them(bits, form):
    weight = random_weight(bits, symmetric=False)
    stored, middle = to_tensors(weight, bits, form), 2 ** (bits - 1)
    assert stored.qweight.shape == (96 * bits // 32, 64)
    assert stored.qzeros.shape == (3, 64 * bits // 32)
    assert weight.zero_point is not None
    for row in (0, 13, 63):
        words = stored.qweight[:, row].tolist()
        for column in range(96):
            assert bits_at(words, column * bits, bits) - middle == int(weight.qdata[row, column])
            assert int(stored.g_idx[column]) == column // 32
    for group in range(3):
        words = stored.qzeros[group].tolist()
        for row in range(64):
            zero = bits_at(words, row * bits, bits) + (form == "gptq")
            assert zero - middle == int(weight.zero_point[row, group])
            assert stored.scales[group, row] == weight.scale[row, group]


@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_layer_comes_back_exactly(bits, symmetric, size):
    weight = random_weight(bits, symmetric=symmetric, size=size)
    for form in ("gptq", "gptq_v2"):
        again = from_tensors(to_tensors(weight, bits, form), bits, size, form)
        assert torch.equal(again.qdata, weight.qdata)
        assert torch.equal(again.scale, weight.scale)
        assert (again.levels, again.group_size) == (weight.levels, size)
        assert again.zero_point is None if symmetric else torch.equal(again.zero_point, weight.zero_point)


@pytest.mark.parametrize("bits", BITS)
def test_words_with_their_highest_bit_set_survive(bits):
    codes = torch.full((64, 3), 2**bits - 1)
    assert bool((pack_words(codes, bits) == -1).all())
    assert torch.equal(unpack_words(pack_words(codes, bits), bits), codes.int())


@pytest.mark.parametrize(
    ("bits", "symmetric", "granularity"),
    [(2, False, 32), (3, True, 16), (4, False, "row"), (8, True, "row"), (5, True, 32)],
)
def test_a_quantized_model_comes_back_exactly(tmp_path, bits, symmetric, granularity):
    model = quantized(bits, symmetric=symmetric, granularity=granularity)
    exported = GPTQExporter(dtype="float32").write(model, None, tmp_path / "out")
    loaded = read(tmp_path / "out")
    assert (loaded.format, exported.layers, exported.difference) == ("gptq", 14, 0.0)
    expected = layers(model)
    for name, weight in layers(loaded.model).items():
        assert torch.equal(weight.dequantize(), expected[name].dequantize())
    assert torch.equal(logits(loaded.model), logits(model))


def test_what_the_loaders_read_is_in_both_configs(tmp_path):
    path = write(quantized(4, symmetric=True), tmp_path / "out")
    entry = json.loads((path / "config.json").read_text())["quantization_config"]
    assert entry == json.loads((path / "quantize_config.json").read_text())
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    assert expected.items() <= entry.items()
    assert entry["checkpoint_format"] == "gptq"
    assert "dynamic" not in entry


def test_one_scale_a_tensor_is_written_for_every_row(tmp_path):
    model = quantized(8, symmetric=True, granularity="tensor")
    path = write(model, tmp_path / "out")
    assert json.loads((path / "config.json").read_text())["quantization_config"]["group_size"] == -1
    scales = load_file(path / "model.safetensors")["model.layers.0.self_attn.q_proj.scales"]
    assert scales.shape == (1, 64)
    assert len(scales.unique()) == 1


def with_zero_point_0() -> PreTrainedModel:
    """All weights of a row positive: the code that stands for 0.0 is the lowest."""
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.abs_()
    quantize(model, RoundToNearest(bits=4, symmetric=False, granularity=32))
    return model


def test_a_zero_point_of_zero_is_stored_as_it_is_or_refused(tmp_path):
    model = with_zero_point_0()
    path = write(model, tmp_path / "auto", dtype="float32")
    assert json.loads((path / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert torch.equal(logits(read(path).model), logits(model))
    with pytest.raises(InputError, match=r"up_proj has a zero point of 0, .* use checkpoint_format=gptq_v2"):
        write(model, tmp_path / "v1", checkpoint_format="gptq")
    assert [each.name for each in tmp_path.iterdir()] == ["auto"]


def test_dense_layers_inside_the_blocks_are_listed(tmp_path):
    model = quantized(exclude=("down_proj",))
    path = write(model, tmp_path / "out")
    entry = json.loads((path / "config.json").read_text())["quantization_config"]
    assert list(entry["dynamic"]) == [f"-:^model\\.layers\\.{block}\\.mlp\\.down_proj$" for block in range(2)]
    attention = [f"self_attn.{which}_proj" for which in "qkvo"]
    assert entry["modules_in_block_to_quantize"] == [[*attention, "mlp.gate_proj", "mlp.up_proj"]]
    found = read(path).model
    assert layers(found).keys() == layers(model).keys()
    assert torch.equal(found.lm_head.weight, model.lm_head.weight.half().float())


def test_blocks_that_differ_are_listed_layer_by_layer(tmp_path):
    path = write(quantized(exclude=("layers.0.mlp.down_proj",)), tmp_path / "out")
    entry = json.loads((path / "config.json").read_text())["quantization_config"]
    assert list(entry["dynamic"]) == ["-:^model\\.layers\\.0\\.mlp\\.down_proj$"]
    assert "modules_in_block_to_quantize" not in entry
    assert "must know the entry `dynamic` of the config" in (path / "README.md").read_text()


def test_a_tied_head_and_biases_come_back(tmp_path):
    config = tiny(tied=True).config
    config.attention_bias = True
    model = LlamaForCausalLM(config).eval()
    for block in model.model.layers:
        nn.init.normal_(block.self_attn.q_proj.bias)
    quantize(model, RoundToNearest(bits=4, symmetric=False, granularity=32))
    path = write(model, tmp_path / "out", dtype="float32")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    again = read(path).model
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def test_the_damping_and_figures_of_the_run_go_with_it(tmp_path):
    record = {"method": "gptq", "model": "tiny", "nll": 3.25, "config": {"ptq": {"damping": 0.05}}}
    GPTQExporter().write(quantized(), None, tmp_path / "out", record)
    entry = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert entry["damp_percent"] == 0.05
    assert "| loss, nats a token | 3.2500 |" in (tmp_path / "out" / "README.md").read_text()


def ternary() -> PreTrainedModel:
    model = tiny()
    convert(model)
    freeze(model)
    return model


def odd() -> PreTrainedModel:
    model = quantized()
    for block in model.model.layers:
        codes = torch.tensor([-3, -1, 1, 3], dtype=torch.int8).repeat(64, 24)
        scale = torch.ones(64, 1, dtype=torch.float16)
        block.mlp.down_proj = QuantizedLinear(QTensor(codes, scale, levels=4, odd=True))
    return model


def mixed() -> PreTrainedModel:
    model = quantized(4, exclude=("down_proj",))
    quantize_rest(model)
    return model


def quantize_rest(model: nn.Module) -> None:
    for block in model.model.layers:
        codes = RoundToNearest(bits=8, symmetric=False, granularity=32).quantize(
            block.mlp.down_proj.weight.detach(), None
        )
        block.mlp.down_proj = QuantizedLinear(codes)


def with_inputs() -> PreTrainedModel:
    model = quantized()
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.activation = absmax
    return model


def with_head() -> PreTrainedModel:
    model = tiny()
    quantize(model, RoundToNearest(bits=4, symmetric=False, granularity=32), driver=Driver(head=True, embeddings=True))
    return model


def narrow() -> PreTrainedModel:
    model = tiny(feed_forward=72)
    quantize(model, RoundToNearest(bits=4, symmetric=False, granularity=32))
    return model


def gpt2() -> PreTrainedModel:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2)).eval()
    quantize(model, RoundToNearest(bits=4, symmetric=False, granularity=32))
    return model


MISFITS = [
    (tiny, "no layer is quantized: quantize it first"),
    (ternary, "its inputs are quantized"),
    (lambda: quantized(scale_dtype="float32"), "its scales are float32 and the format's float16"),
    (with_inputs, "its inputs are quantized"),
    (with_head, "runtimes do not load a packed head"),
    (narrow, "out_features must be a multiple of 32, got 72"),
    (narrow, "in_features must be a multiple of the group size, got 72 and 32"),
    (gpt2, "it is a Conv1D"),
    (odd, "its codes are odd numbers"),
    (mixed, "4 bits with groups of 32"),
    (lambda: nn.Linear(4, 4), "expected a transformers model"),
]


@pytest.mark.parametrize(("make", "message"), MISFITS)
def test_what_the_format_cannot_hold_is_said_before_any_work(tmp_path, make, message):
    model = make()
    assert message in "; ".join(GPTQExporter().problems(model))
    with pytest.raises(InputError, match="a GPTQ checkpoint cannot carry this model"):
        write(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"checkpoint_format": "marlin"}, {"dtype": "int8"}])
def test_options_that_do_not_exist_are_refused(options):
    with pytest.raises(InputError, match="must be one of"):
        GPTQExporter(**options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return write(quantized(4), tmp_path_factory.mktemp("whole") / "out")


def copy(source: Path, target: Path, tensors: dict[str, torch.Tensor | None], **config) -> Path:
    """A folder with some tensors replaced (None: left out) and some entries of its quantization_config changed."""
    target.mkdir()
    values = {**load_file(source / "model.safetensors"), **tensors}
    save_file({name: each for name, each in values.items() if each is not None}, target / "model.safetensors")
    entries = json.loads((source / "config.json").read_text())
    entries["quantization_config"].update(config)
    (target / "config.json").write_text(json.dumps(entries))
    return target


NAME = "model.layers.1.mlp.down_proj"
DAMAGE = {
    "no codes": ({f"{NAME}.qweight": None}, {}, rf"lacks the tensor {NAME}\.qweight"),
    "no scales": ({f"{NAME}.scales": None}, {}, rf"lacks the tensor {NAME}\.scales"),
    "no zeros": ({f"{NAME}.qzeros": None}, {}, rf"lacks the tensor {NAME}\.qzeros"),
    "too many": ({f"{NAME}.weight": torch.ones(64, 96)}, {}, rf"no place for: {NAME}\.weight"),
    "shape": ({f"{NAME}.qweight": torch.zeros(12, 32, dtype=torch.int32)}, {}, r"to be int32 \[12, 64\], got"),
    "dtype": ({f"{NAME}.scales": torch.ones(3, 64)}, {}, r"to be float16 \[3, 64\], got float32"),
    "scale 0": ({f"{NAME}.scales": torch.zeros(3, 64).half()}, {}, rf"{NAME}: every scale must be positive"),
    "scale < 0": ({f"{NAME}.scales": -torch.ones(3, 64).half()}, {}, rf"{NAME}: every scale must be positive"),
    "scale NaN": ({f"{NAME}.scales": torch.full((3, 64), torch.nan).half()}, {}, rf"{NAME}: every scale must be"),
    "order": ({f"{NAME}.g_idx": torch.arange(96).flip(0).int() // 32}, {}, rf"{NAME}: g_idx assigns .* out of order"),
    "zeros": ({f"{NAME}.qzeros": torch.full((3, 8), -1).int()}, {}, rf"{NAME}: a zero point of 16 is none"),
    "bits": ({}, {"bits": 8}, r"to be int32 \[16, 64\], got int32 \[8, 64\]"),
    "no bits": ({}, {"bits": 5}, "bits must be one of"),
    "group": ({}, {"group_size": 0}, "group_size must be -1"),
    "other groups": ({}, {"group_size": 16}, r"qzeros to be int32 \[4, 8\]"),
    "format": ({}, {"checkpoint_format": "marlin"}, "checkpoint_format must be one of"),
}


@pytest.mark.parametrize(("tensors", "config", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_refused_and_the_tensor_named(tmp_path, whole, tensors, config, message):
    with pytest.raises(InputError, match=message):
        read(copy(whole, tmp_path / "copy", tensors, **config))


def test_a_truncated_file_is_refused(tmp_path, whole):
    path = copy(whole, tmp_path / "copy", {})
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(InputError, match="no whole safetensors file"):
        read(path)


def test_training_on_it_is_refused_and_says_what_to_do(whole):
    with pytest.raises(InputError, match=r"cannot be trained.*read it with bitnet\.export\.load"):
        from_directory(whole)


@pytest.mark.parametrize("what", ["qweight", "qzeros", "scales"])
def test_one_changed_bit_is_noticed_before_the_folder_gets_its_name(tmp_path, monkeypatch, what):
    original = gptq._stored

    def changed(*arguments):
        for name, tensor in original(*arguments):
            if name == f"{NAME}.{what}":
                tensor.view(torch.uint8)[0, 0] ^= 1
            yield name, tensor

    monkeypatch.setattr(gptq, "_stored", changed)
    with pytest.raises(ExportError, match="read back"):
        write(quantized(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", ["model_card", "read"])
def test_a_full_disk_leaves_nothing_and_an_existing_folder_is_left_alone(tmp_path, monkeypatch, function):
    model = quantized()
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="exists already"):
        write(model, tmp_path / "mine")

    def stop(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gptq, function, stop)
    with pytest.raises(OSError, match="No space left"):
        write(model, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


def test_writing_leaves_the_model_as_it_was(tmp_path):
    model = quantized()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = model.config.to_dict()
    write(model.train(), tmp_path / "out")
    assert model.training
    assert model.config.to_dict() == settings
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_how_the_model_generates_survives_whatever_transformers_thinks_of_it(tmp_path):
    model = quantized()
    model.generation_config = GenerationConfig(temperature=0.6, eos_token_id=[1, 7])  # without do_sample
    found = read(write(model, tmp_path / "out")).model.generation_config
    assert (found.temperature, found.eos_token_id) == (0.6, [1, 7])


def test_what_the_format_does_not_hold_names_methods_that_it_does():
    model = tiny()
    quantize(model, HQQ(), torch.randint(128, (2, 16)))
    [reason] = GPTQExporter().problems(model)
    assert "ptq=absmax, zeropoint, gptq or gptq_refined" in reason


def test_a_head_tied_by_hand_is_stored_beside_the_embedding(tmp_path):
    model = quantized()
    model.lm_head.weight = model.model.embed_tokens.weight
    path = write(model, tmp_path / "out", dtype="float32")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= load_file(path / "model.safetensors").keys()
    assert torch.equal(logits(read(path).model), logits(model))


def test_a_tokenizer_of_a_larger_model_and_a_body_without_a_head_are_refused():
    words = {f"w{number}": number for number in range(129)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    [problem] = GPTQExporter().problems(quantized(), tokenizer)
    assert "the token id 128, and the model 128 embeddings" in problem
    assert "LlamaForCausalLM" in "; ".join(GPTQExporter().problems(quantized().model))


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 300000}, {"num_hidden_layers": 10**30}, {"hidden_size": [1]}, {"pad_token_id": 999}],
)
def test_a_damaged_config_is_refused(tmp_path, changes):
    path = write(quantized(), tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=r"config\.json"):
        read(path)
