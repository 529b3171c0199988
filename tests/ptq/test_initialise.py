"""Latent weights to begin a training with."""

import copy
from functools import partial

import pytest
import torch
from toy_models import tiny_gpt2, tiny_llama

from bitnet.errors import InputError
from bitnet.nn import BitLinear158, LatentLoRA, bit_linears, convert, freeze
from bitnet.ptq import BiLLM, Compensated, FromMethod, LayerStats, LeastSquares, RoundToNearest, initialise
from bitnet.quant import LSQ, SEQ, Grid, LearnedScale, absmax, absmean_ternary, centred_sign
from bitnet.quant.layer_grid import LayerGrid

QUANTIZERS = {
    "absmean": absmean_ternary,
    "absmean row": partial(absmean_ternary, granularity="row"),
    "sign": centred_sign,
    "seq2": SEQ(2),
    "lsq2": LSQ(2),
    "lsq4 group": LSQ(4, 16),
    "int4": Grid(4, True, 16),
    "int4 tensor": Grid(4, True, "tensor"),
}
EVERY = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS.keys())


def converted(model, quantizer, **options):
    convert(model, partial(BitLinear158.from_linear, quantizer=quantizer), **options)
    return model


@pytest.fixture(scope="module")
def correlated():
    """A weight, and statistics of inputs that are of different sizes, correlated, and zero in one column."""
    torch.manual_seed(0)
    x = torch.randn(400, 50) * torch.rand(50).exp() ** 2 + torch.randn(400, 4) @ torch.randn(4, 50)
    x[:, 11] = 0
    weight = torch.randn(24, 50) * 0.05
    weight[2], weight[5, 7] = 0, 0.6
    return weight, x


def output_error(weight, values, x):
    return float(((values - weight) @ x.t()).square().sum())


def begun(start, quantizer, weight, x):
    grid = LayerGrid.of(quantizer)
    codes, scale = start.begin(weight, grid, LayerStats(n_tokens=len(x), hessian=x.t() @ x / len(x)))
    assert codes.shape == weight.shape
    assert ((codes >= grid.low) & (codes <= grid.high) & (codes == codes.round())).all()
    assert torch.equal(grid.stored(scale), scale)
    return codes * grid.columns(scale, weight.shape[1])


@EVERY
def test_compensation_lowers_the_outputs_error_and_descent_lowers_it_further(quantizer, correlated):
    weight, x = correlated
    starts = (LeastSquares(), Compensated(), Compensated(sweeps=6))
    errors = [output_error(weight, begun(start, quantizer, weight, x), x) for start in starts]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.98 * errors[1]


@pytest.mark.parametrize("name", ["absmean", "absmean row", "lsq4 group"])
def test_the_descent_gains_by_refitting_scales(name, correlated, monkeypatch):
    weight, x = correlated
    refitted = output_error(weight, begun(Compensated(sweeps=4), QUANTIZERS[name], weight, x), x)
    monkeypatch.setattr("bitnet.ptq.starts._Columns.refit", lambda self, start, values, gradient, hessian: values)
    assert refitted < 0.999 * output_error(weight, begun(Compensated(sweeps=4), QUANTIZERS[name], weight, x), x)


def test_the_loop_is_gptqs_own_on_the_same_grid(correlated):
    """The textbook loop, column by column, whole rest of the matrix after each."""
    weight, x = correlated
    hessian = x.t() @ x / len(x)
    grid = LayerGrid.of(LSQ(3))
    found = begun(Compensated(), LSQ(3), weight, x)
    alive = hessian.clone()
    alive.diagonal().add_(0.01 * hessian.diagonal().mean())
    alive[11, 11] = 1
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(alive[order][:, order].double()), upper=True)
    scale = grid.fit(weight, hessian.diagonal().clamp(min=1e-6 * float(hessian.diagonal().mean())))
    rest, values = weight[:, order].double(), torch.empty(weight.shape)
    for j, column in enumerate(order.tolist()):
        values[:, column] = grid.nearest(rest[:, j].float() / scale[:, 0]) * scale[:, 0]
        error = (rest[:, j] - values[:, column]) / upper[j, j]
        rest[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    agreement = (values == found).float().mean()
    assert agreement > 0.995  # float32 against float64: a value at a border may fall to either side


@EVERY
@pytest.mark.parametrize("start", [LeastSquares(), Compensated(sweeps=2)])
def test_the_layers_answer_with_the_codes_that_were_found_for_them(quantizer, start, text):
    model = converted(tiny_llama(), quantizer)
    before = {name: layer.weight.detach().clone() for name, layer in bit_linears(model)}
    results = initialise(model, start, text)
    layers = dict(bit_linears(model))
    assert [result.name for result in results] == list(layers)
    for result in results:
        layer, old = layers[result.name], before[result.name]
        assert not torch.equal(layer.weight, old)
        error = float((layer.quantized_weight().dequantize() - old).square().sum() / old.square().sum())
        assert error == pytest.approx(result.weight_error, rel=1e-3)


@EVERY
def test_the_model_begins_nearer_to_the_dense_one(quantizer, text):
    dense = tiny_llama()
    answers = []
    for start in (None, Compensated(sweeps=3)):
        model = converted(copy.deepcopy(dense), quantizer)
        if start is not None:
            initialise(model, start, text)
        with torch.no_grad():
            answers.append(float((model(text).logits - dense(text).logits).square().mean()))
    assert answers[1] < 0.9 * answers[0]


def test_a_frozen_model_answers_as_the_initialised_one(text):
    model = converted(tiny_llama(), absmean_ternary)
    initialise(model, Compensated(), text)
    with torch.no_grad():
        trained = model(text).logits
        freeze(model)
        assert torch.equal(model(text).logits, trained)


def test_later_layers_are_calibrated_on_the_quantized_earlier_ones_and_their_inputs(text, monkeypatch):
    """What a layer is calibrated on is what it gets in the finished model, quantizers of inputs and all."""
    seen = {}
    begin = Compensated.begin

    def watch(self, weight, grid, stats):
        seen[len(seen)] = stats.hessian.clone()
        return begin(self, weight, grid, stats)

    monkeypatch.setattr(Compensated, "begin", watch)
    model = converted(tiny_llama(), absmean_ternary)
    results = initialise(model, Compensated(), text)
    index = [result.name for result in results].index("model.layers.1.mlp.down_proj")
    inputs = []
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    with torch.no_grad():
        model(text)
    x = inputs[0].flatten(0, 1)
    torch.testing.assert_close(seen[index], x.t() @ x / len(x), rtol=1e-3, atol=1e-4)


def test_values_of_another_method_are_rounded_to_the_layers_grid(correlated):
    weight, x = correlated
    stats = LayerStats(n_tokens=len(x), hessian=x.t() @ x / len(x))
    grid = LayerGrid.of(absmean_ternary)
    start = FromMethod(method=RoundToNearest(bits=2, symmetric=False))
    codes, scale = start.begin(weight, grid, stats)
    values = RoundToNearest(bits=2, symmetric=False).quantize(weight, None).dequantize()
    assert torch.equal(codes, grid.nearest(values / scale))
    assert start.requires == frozenset()
    assert FromMethod(method=BiLLM()).requires == BiLLM().requires


def test_what_is_initialised_twice_alike_is_alike_and_draws_no_random_numbers(text):
    models = [converted(tiny_llama(), SEQ(2)) for _ in range(2)]
    state = torch.get_rng_state()
    for model in models:
        initialise(model, Compensated(sweeps=1), text)
    assert torch.equal(torch.get_rng_state(), state)
    for (_, one), (_, other) in zip(*map(bit_linears, models), strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.quantizer.scale, other.quantizer.scale)


def test_the_scale_of_a_learned_quantizer_is_set_and_stays_the_same_parameter(text):
    model = converted(tiny_llama(), LSQ(2))
    layer = bit_linears(model)[0][1]
    weight, scale, before = layer.weight, layer.quantizer.scale, layer.quantizer.scale.detach().clone()
    initialise(model, LeastSquares())
    layer = bit_linears(model)[0][1]
    assert layer.weight is weight
    assert layer.quantizer.scale is scale
    assert not torch.equal(scale, before)


@pytest.mark.parametrize("exclude", [None, []], ids=["without the head", "with the head"])
def test_a_head_that_is_quantized_is_initialised_too(exclude, text):
    model = converted(tiny_llama(), absmean_ternary, exclude=exclude)
    results = initialise(model, Compensated(), text)
    assert len(results) == len(bit_linears(model)) == (14 if exclude is None else 15)


def test_biases_and_fused_layers_of_another_body_are_kept(text):
    model = converted(tiny_gpt2(), absmean_ternary)
    bias = bit_linears(model)[0][1].bias
    initialise(model, Compensated(), text)
    assert bit_linears(model)[0][1].bias is bias


def test_whatever_fails_leaves_the_model_as_it_was(text, monkeypatch):
    model = converted(tiny_llama(), absmean_ternary)
    before = copy.deepcopy(model.state_dict())
    calls = []

    def fail(self, *arguments):
        calls.append(0)
        if len(calls) == 9:
            raise RuntimeError("full")
        return LeastSquares().begin(*arguments)

    monkeypatch.setattr(Compensated, "begin", fail)
    with pytest.raises(RuntimeError, match="full"):
        initialise(model, Compensated(), text)
    assert len(bit_linears(model)) == 14
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.bfloat16(), r"set in float32, got torch.bfloat16"),
        (lambda model: setattr(bit_linears(model)[3][1], "quantizer", centred_sign), r"layers of different quantizers"),
        (lambda model: setattr(bit_linears(model)[3][1], "activation", partial(absmax)), r"layers of different"),
        (lambda model: freeze(model), r"no BitLinear to initialise"),
        (lambda model: LatentLoRA(rank=2)(model), r"q_proj has an adapter: initialise first"),
    ],
)
def test_a_model_that_it_does_not_fit_is_refused(change, message):
    model = converted(tiny_llama(), absmean_ternary)
    change(model)
    with pytest.raises(InputError, match=message):
        initialise(model, LeastSquares())


def test_text_that_is_missing_is_asked_for():
    with pytest.raises(InputError, match=r"Compensated needs calibration text"):
        initialise(converted(tiny_llama(), absmean_ternary), Compensated())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Compensated(damping=0), r"init.damping must be above 0"),
        (lambda: Compensated(correction=2), r"init.correction must be between 0"),
        (lambda: Compensated(sweeps=-1), r"init.sweeps must be a whole number"),
        (lambda: LeastSquares(depth=0), r"init.depth must be above 0"),
        (lambda: FromMethod(method=BiLLM), r"init.method must be a post-training method"),
    ],
)
def test_options_that_do_not_fit_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_scales_stay_learned(text):
    model = converted(tiny_llama(), SEQ(2))
    initialise(model, LeastSquares())
    assert all(isinstance(layer.quantizer, LearnedScale) for _, layer in bit_linears(model))
