import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import tiny_llama
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from bitnet.errors import InputError
from bitnet.nn import QuantizedEmbedding, QuantizedLinear
from bitnet.ptq import GPTQ, Driver, LayerStats, Statistic, quantize
from bitnet.ptq.blocks import find_blocks, linears_of, sharing_an_input
from bitnet.ptq.flow import Flow
from bitnet.quant import QTensor, StaticActivation, absmax
from bitnet.quant.grid import Grid


class Nearest:
    """Round to nearest; keeps the statistics it was given."""

    claimed_bits = 4.0

    def __init__(self, *requires: Statistic) -> None:
        self.requires = frozenset(requires)
        self.seen: list[LayerStats | None] = []

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> QTensor:
        self.seen.append(stats)
        return Grid(4).quantize(weight)

    def __repr__(self) -> str:
        return f"Nearest({sorted(self.requires)})"


class Experts(nn.Module):
    """A block with two experts, of which the second only reads tokens that a router sends there: none."""

    def __init__(self, reached: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.reached = reached

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.experts[0](hidden)
        return hidden + self.experts[1](hidden) if self.reached else hidden


class Mixture(nn.Module):
    def __init__(self, reached: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 8)
        self.layers = nn.ModuleList([Experts(True), Experts(reached)])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def hessian_of(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    """Mean of x x^T of a layer's inputs, by an ordinary forward pass of the whole model."""
    inputs: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    logits(model, ids)
    handle.remove()
    x = torch.cat([each.reshape(-1, each.shape[-1]) for each in inputs])
    return x.T @ x / len(x)


def test_every_linear_of_the_blocks_is_quantized_and_nothing_else(llama, text):
    results = quantize(llama, GPTQ(), text)
    quantized = [name for name, module in llama.named_modules() if isinstance(module, QuantizedLinear)]
    assert sorted(quantized) == sorted(result.name for result in results)
    assert len(results) == 14
    assert type(llama.lm_head) is nn.Linear


def test_layers_that_read_the_same_tensor_are_found_by_watching(llama, text):
    _, blocks = find_blocks(llama)
    seen = []
    blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    logits(llama, text)
    args, kwargs = seen[0]
    stages = sharing_an_input(blocks[0], list(linears_of(blocks[0])), lambda: blocks[0](*args, **kwargs))
    assert [[name.split(".")[-1] for name in stage] for stage in stages] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_each_stage_is_calibrated_on_what_the_quantized_layers_before_it_give(text):
    model, method = tiny_llama(), Nearest(Statistic.HESSIAN)
    names = [result.name for result in quantize(model, method, text)]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        stats = method.seen[names.index(name)]
        assert stats is not None
        assert stats.n_tokens == text.numel()
        assert torch.allclose(stats.hessian, hessian_of(model, name, text), rtol=1e-3, atol=1e-5)


def test_layers_of_a_stage_share_one_statistics_object(llama, text):
    method = Nearest(Statistic.HESSIAN)
    quantize(llama, method, text)
    assert method.seen[0] is method.seen[1] is method.seen[2]
    assert method.seen[3] is not method.seen[0]


def test_without_true_sequential_the_stages_of_a_block_see_its_full_precision_inside(text):
    model, method = tiny_llama(), Nearest(Statistic.HESSIAN)
    expected = hessian_of(model, "model.layers.0.mlp.down_proj", text)
    quantize(model, method, text, driver=Driver(true_sequential=False))
    assert torch.allclose(method.seen[6].hessian, expected, rtol=1e-3, atol=1e-5)


def test_the_cross_statistic_pairs_each_token_with_its_full_precision_input(text):
    original, model, method = tiny_llama(), tiny_llama(), Nearest(Statistic.CROSS)
    quantize(model, method, text, driver=Driver(layer_errors=False))
    name = "model.layers.1.mlp.down_proj"
    inputs: dict[int, Tensor] = {}
    for index, each in enumerate((original, model)):
        each.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, index=index: inputs.update({index: arguments[0].flatten(0, 1)})
        )
        logits(each, text)
    expected = (inputs[1] - inputs[0]).T @ inputs[1] / len(inputs[0])
    assert expected.abs().max() > 1e-3
    assert torch.allclose(method.seen[13].cross, expected, rtol=1e-3, atol=1e-5)


def test_the_layer_results_are_those_of_the_model(text):
    original, model = tiny_llama(), tiny_llama()
    results = quantize(model, GPTQ(bits=3), text)
    for result in results:
        exact = original.get_submodule(result.name).weight.detach()
        values = model.get_submodule(result.name).weight.dequantize()
        assert result.weight_error == pytest.approx(float(((exact - values) ** 2).sum() / (exact**2).sum()), rel=1e-5)
        assert 0 < result.relative_error < 0.2
        assert result.damping == 0.01


def test_gptq_of_a_model_stays_closer_to_it_than_rounding(text):
    original = tiny_llama()
    held_out = torch.randint(0, 60, (8, 24))
    expected = logits(original, held_out)

    def error(method: Any, **options: Any) -> float:
        model = tiny_llama()
        quantize(model, method, text, **options)
        return float((logits(model, held_out) - expected).square().mean())

    assert error(GPTQ(bits=4)) < 0.8 * error(Nearest())


def test_a_method_without_statistics_needs_no_text(llama):
    results = quantize(llama, Nearest())
    assert len(results) == 14
    assert all(result.relative_error is None for result in results)


def test_hidden_states_in_files_give_the_same_model(text, tmp_path):
    in_memory, spilled = tiny_llama(), tiny_llama()
    quantize(in_memory, GPTQ(correction=0.5), text)
    quantize(spilled, GPTQ(correction=0.5), text, driver=Driver(memory_budget=5000))
    assert same_weights(in_memory, spilled)


def test_a_quantization_that_was_killed_ends_with_the_same_model(text, tmp_path):
    class Killed(Exception):
        pass

    class KilledAfterOneBlock:
        def begin(self, blocks: int) -> None: ...
        def layer(self, name: str, error: float | None) -> None: ...
        def end(self) -> None: ...
        def block(self, number: int, resumed: bool = False) -> None:
            raise Killed

    whole, broken = tiny_llama(), tiny_llama()
    method = GPTQ(correction=0.5, sweeps=1)
    expected = quantize(whole, method, text, activation=absmax)
    with pytest.raises(Killed):
        quantize(broken, method, text, activation=absmax, directory=tmp_path / "j", progress=KilledAfterOneBlock())
    resumed = tiny_llama()
    results = quantize(resumed, method, text, activation=absmax, directory=tmp_path / "j")
    assert same_weights(whole, resumed)
    assert torch.equal(logits(whole, text), logits(resumed, text))
    assert [each.relative_error for each in results] == [each.relative_error for each in expected]


@pytest.mark.parametrize("change", ["method", "driver", "calibration", "model", "activation"])
def test_an_unfinished_quantization_with_other_settings_is_refused(text, tmp_path, change):
    arguments: dict[str, Any] = {"method": GPTQ(), "calibration": text, "driver": Driver()}
    quantize(tiny_llama(), **arguments, directory=tmp_path / "j")
    other = {
        "method": GPTQ(bits=3),
        "calibration": text.flip(0),
        "driver": Driver(batch_size=4),
        "activation": absmax,
    }
    model = tiny_llama()
    if change == "model":
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    else:
        arguments[change] = other[change]
    with pytest.raises(InputError, match=f"another {change}"):
        quantize(model, **arguments, directory=tmp_path / "j")


def test_the_settings_of_a_journal_mean_the_same_in_another_process(text, tmp_path):
    for each in (absmax, partial(absmax, bits=4)):
        quantize(tiny_llama(), GPTQ(), text, activation=each, directory=tmp_path / str(id(each)))
        settings = (tmp_path / str(id(each)) / "settings.json").read_text()
        assert "bitnet.quant.absmax:absmax" in settings
        assert " at 0x" not in settings


def test_a_folder_with_something_else_in_it_is_left_alone(llama, text, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        quantize(llama, GPTQ(), text, directory=tmp_path)


def test_a_damaged_block_is_named(text, tmp_path):
    quantize(tiny_llama(), GPTQ(), text, directory=tmp_path / "j")
    file = tmp_path / "j" / "block_00001.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"block_00001.* is damaged"):
        quantize(tiny_llama(), GPTQ(), text, directory=tmp_path / "j")


def test_conv1d_fused_and_biased_layers_keep_their_function(gpt2, text):
    original = copy.deepcopy(gpt2)
    results = quantize(gpt2, GPTQ(bits=8), text)
    shapes = {result.name.removeprefix("transformer.h.0."): result.shape for result in results[:4]}
    assert shapes == {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
    assert (logits(gpt2, text) - logits(original, text)).std() < 0.03 * logits(original, text).std()


def test_activations_are_quantized_too_where_that_is_asked_for(text):
    plain, both = tiny_llama(), tiny_llama()
    quantize(plain, GPTQ(), text)
    quantize(both, GPTQ(), text, activation=absmax)
    layer = both.model.layers[0].self_attn.q_proj
    assert layer.activation is absmax
    assert not torch.equal(logits(plain, text), logits(both, text))


def test_two_quantizers_for_the_activations_are_refused(llama, text):
    method = Nearest()
    method.activation = absmax
    with pytest.raises(InputError, match="quantizes the activations itself"):
        quantize(llama, method, text, activation=absmax)


def test_the_head_is_quantized_on_request_with_the_inputs_it_really_has(text):
    model, method = tiny_llama(), Nearest(Statistic.HESSIAN)
    quantize(model, method, text, driver=Driver(head=True))
    assert isinstance(model.lm_head, QuantizedLinear)
    assert torch.allclose(method.seen[-1].hessian, hessian_of(model, "lm_head", text), rtol=1e-3, atol=1e-5)


def test_a_tied_head_stays_as_it_is(text):
    model = tiny_llama(tie_word_embeddings=True)
    assert len(quantize(model, GPTQ(), text)) == 14
    with pytest.raises(InputError, match="one parameter"):
        quantize(tiny_llama(tie_word_embeddings=True), GPTQ(), text, driver=Driver(head=True))


def test_patterns_choose_the_layers(llama, text):
    results = quantize(llama, GPTQ(), text, driver=Driver(include=("layers.1.*",), exclude=("down_proj", "o_proj")))
    names = [result.name.removeprefix("model.layers.1.") for result in results]
    assert names == [f"self_attn.{x}_proj" for x in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    for driver in (Driver(include=("q_porj",)), Driver(exclude=("nothing",))):
        with pytest.raises(InputError, match="matches none"):
            quantize(tiny_llama(), GPTQ(), text, driver=driver)
    with pytest.raises(InputError, match="nothing is left"):
        quantize(tiny_llama(), GPTQ(), text, driver=Driver(exclude=("*",)))


def test_a_layer_that_no_token_reaches_is_named(text):
    with pytest.raises(InputError, match=r"no calibration token reaches layers.1.experts.1.*driver.exclude"):
        quantize(Mixture(), GPTQ(), text)
    results = quantize(Mixture(), GPTQ(), text, driver=Driver(exclude=("layers.1.experts.1",)))
    assert [result.name for result in results] == ["layers.0.experts.0", "layers.0.experts.1", "layers.1.experts.0"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused_with_the_layer_that_has_them(llama, text, bad):
    llama.model.layers[1].input_layernorm.weight.data[3] = bad
    with pytest.raises(InputError, match=r"inputs of model.layers.1.self_attn.q_proj hold NaN or infinity"):
        quantize(llama, GPTQ(), text)


def test_a_weight_that_is_not_finite_is_refused_with_its_name(llama, text):
    llama.model.layers[1].mlp.up_proj.weight.data[3, 2] = torch.nan
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj: "):
        quantize(llama, GPTQ(), text)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "GPTQ need calibration text"),
        (torch.zeros(3, 4), "token ids"),
        (torch.zeros(4, dtype=torch.long), "token ids"),
        (torch.zeros(0, 4, dtype=torch.long), "token ids"),
    ],
)
def test_calibration_that_is_no_text_is_refused(llama, calibration, message):
    with pytest.raises(InputError, match=message):
        quantize(llama, GPTQ(), calibration)


def test_a_model_without_blocks_is_refused(text):
    with pytest.raises(InputError, match="no list of blocks"):
        quantize(nn.Sequential(nn.Linear(4, 4)), GPTQ(), text)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"smoothquant": 2.0}, {"memory_budget": -1.0}])
def test_driver_options_that_cannot_be_used_are_refused(options):
    with pytest.raises(InputError, match=f"driver.{next(iter(options))}"):
        Driver(**options)


def test_smoothing_moves_the_full_precision_inputs_into_the_same_units(text):
    """At the first block both models have the same inputs: nothing may be left to correct."""
    model, method = tiny_llama(), Nearest(Statistic.CROSS, Statistic.HESSIAN)
    model.model.layers[0].input_layernorm.weight.data[3] = 30.0
    quantize(model, method, text, driver=Driver(smoothquant=0.5))
    first = method.seen[0]
    assert first.cross.abs().max() < 1e-4 * first.hessian.abs().max()


@pytest.mark.parametrize("options", [{"driver": Driver(smoothquant=0.5)}, {"activation": StaticActivation()}, {}])
def test_blocks_of_an_earlier_start_come_back_with_smoothing_and_ranges(text, tmp_path, options):
    whole = tiny_llama()
    quantize(whole, GPTQ(correction=0.5), text, **options, directory=tmp_path / "j")
    (tmp_path / "j" / "block_00001.safetensors").unlink()
    resumed = tiny_llama()
    quantize(resumed, GPTQ(correction=0.5), text, **options, directory=tmp_path / "j")
    assert same_weights(whole, resumed)


def test_a_write_that_was_killed_is_no_obstacle(text, tmp_path):
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / ".settings.json.1234.partial").write_text("{")
    assert len(quantize(tiny_llama(), GPTQ(), text, directory=tmp_path / "j")) == 14


def test_models_that_differ_in_the_place_of_two_weights_are_told_apart(text, tmp_path):
    quantize(tiny_llama(), GPTQ(), text, directory=tmp_path / "j")
    model = tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.flip(0)
    with pytest.raises(InputError, match="another model"):
        quantize(model, GPTQ(), text, directory=tmp_path / "j")


def test_blocks_with_arguments_of_their_own_get_them(text):
    """Gemma 3 gives local and global attention other masks and rotary tables."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=5, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    _, blocks = find_blocks(model)
    expected: list[Tensor] = []
    handle = blocks[-1].register_forward_hook(lambda module, args, output: expected.append(output))
    logits(model, text[:8])
    handle.remove()
    with torch.no_grad(), Flow(model, blocks, text, batch_size=8, memory_budget=1e9) as flow:
        for index, block in enumerate(blocks):
            if index == len(blocks) - 1:
                found = flow.call(index, block, next(iter(flow.states()))[0])
            else:
                flow.advance(index, block, None)
    assert torch.equal(found, expected[0])


def test_blocks_whose_other_inputs_depend_on_the_text_are_refused(text):
    class Peeking(Mixture):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            hidden = self.embedding(input_ids)
            for layer in self.layers:
                hidden = layer(hidden, input_ids)
            return hidden

    model = Peeking(True)
    for layer in model.layers:
        layer.forward = lambda hidden, ids, layer=layer: Experts.forward(layer, hidden)
    with pytest.raises(InputError, match="depend on the text"):
        quantize(model, GPTQ(), text)


def test_matrices_outside_linear_layers_are_named(text):
    model = Mixture(True)
    model.layers[0].extra = nn.Parameter(torch.randn(2, 8, 8))
    with pytest.warns(UserWarning, match=r"31% of the weights .* stay as they are: layers.0.extra"):
        quantize(model, GPTQ(), text)


def test_an_embedding_that_does_more_than_look_up_is_refused(llama, text):
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input)

    llama.set_input_embeddings(Scaled(60, 40))
    with pytest.raises(InputError, match=r"no plain nn\.Embedding, got Scaled"):
        quantize(llama, Nearest(), driver=Driver(embeddings=True))


def test_embeddings_are_looked_up_in_their_quantized_values(text):
    model = tiny_llama()
    quantize(model, Nearest(), driver=Driver(embeddings=True))
    embedding = model.model.embed_tokens
    assert isinstance(embedding, QuantizedEmbedding)
    assert torch.equal(embedding(text), embedding.weight.dequantize()[text])
    with pytest.raises(InputError, match="no inputs that GPTQ could be calibrated on"):
        quantize(tiny_llama(), GPTQ(), text, driver=Driver(embeddings=True))


def test_ids_that_the_model_cannot_read_are_refused(llama, text):
    for ids, message in ((text + 60, "60 embeddings"), (text - 1, "ids from -1"), (text.repeat(1, 3), "takes 64")):
        with pytest.raises(InputError, match=message):
            quantize(llama, GPTQ(), ids)
    for ids in (text.tolist(), text > 3, text.to(torch.complex64)):
        with pytest.raises(InputError, match="token ids"):
            quantize(llama, GPTQ(), ids)


def test_a_method_has_to_be_made_and_a_pattern_may_stand_alone(llama, text):
    with pytest.raises(InputError, match=r"GPTQ\(\), not GPTQ"):
        quantize(llama, GPTQ, text)
    assert len(quantize(llama, GPTQ(), text, driver=Driver(exclude="q_proj"))) == 12
