"""The promise of the layer: what was trained is what is frozen, bit for bit, and gradients pass straight through."""

from functools import partial

import pytest
import torch
from torch import nn

from bitnet import BitLinear, BitLinear158, InputError, QuantizedLinear
from bitnet.quant import absmax, absmean_int4, absmean_ternary, centred_sign, zero_point

LAYERS = [
    BitLinear,
    BitLinear158,
    partial(BitLinear158, quantizer=partial(absmean_ternary, granularity="row")),
    partial(BitLinear158, quantizer=partial(absmean_ternary, granularity=20)),
    partial(BitLinear, quantizer=partial(centred_sign, granularity="row")),
    partial(BitLinear158, quantizer=partial(zero_point, bits=4)),
    partial(BitLinear158, activation=zero_point),
    partial(BitLinear158, activation=absmean_int4),
]


def make(layer, dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    layer = layer(48, 16, bias=bias, dtype=dtype)
    nn.init.normal_(layer.weight, std=0.02)  # uniform values have no tails and hide rounding errors
    return layer, torch.randn(2, 5, 48, dtype=dtype)


@pytest.mark.parametrize("seed", range(4))  # the rounding hides for some scales
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_frozen_layer_answers_bit_for_bit_like_the_trained_one(layer, dtype, seed):
    layer, x = make(layer, dtype, seed=seed)
    assert torch.equal(layer(x), layer.freeze()(x))


@pytest.mark.parametrize("layer", LAYERS)
def test_frozen_layer_answers_the_same_under_autocast(layer):
    layer, x = make(layer)
    with torch.autocast("cpu", torch.bfloat16):
        trained, frozen = layer(x), layer.freeze()(x)
    assert trained.dtype == torch.bfloat16
    assert torch.equal(trained, frozen)
    assert torch.equal(trained, layer(x).bfloat16())  # rounded once, at the end


def test_value_is_the_published_formula():
    layer, x = make(BitLinear158)
    weight, x64 = layer.weight.double(), x.double()
    unit = weight.abs().mean()
    t = (weight / unit).round().clamp(-1, 1)
    step = x64.abs().amax(-1, keepdim=True) / 127
    expected = ((x64 / step).round() @ t.T) * unit * step + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_those_of_a_dense_layer_of_the_quantized_values(layer, dtype):
    layer, x = make(layer, dtype)
    x.requires_grad_()
    gradient = torch.randn(2, 5, 16, dtype=dtype)
    layer(x).backward(gradient)
    xq, wq = layer.activation(x).dequantize(), layer.quantized_weight().dequantize()
    flat = gradient.float().flatten(0, 1)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(x.grad.float(), gradient.float() @ wq, **tolerance)
    torch.testing.assert_close(layer.weight.grad.float(), flat.T @ xq.flatten(0, 1), **tolerance)
    torch.testing.assert_close(layer.bias.grad.float(), flat.sum(0), **tolerance)
    assert x.grad.dtype == layer.weight.grad.dtype == dtype


def test_latent_weights_outside_the_clipping_range_still_get_a_gradient():
    layer, x = make(BitLinear158)
    with torch.no_grad():
        layer.weight[0, 0] = 50.0
    layer(x).sum().backward()
    assert layer.weight.grad[0, 0] != 0


def test_what_is_kept_for_the_backward_pass_is_one_byte_a_value():
    layer, x = make(BitLinear158)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    assert sum(t.numel() * t.element_size() for t in kept) <= layer.weight.numel() + x.numel() + 4 * (1 + 10)


@pytest.mark.parametrize("rows", [(), (1,), (0,), (3, 0), (2, 3, 4)])
def test_any_number_of_leading_dimensions_works(rows):
    layer, _ = make(BitLinear158)
    y = layer(torch.randn(*rows, 48, requires_grad=True))
    assert y.shape == (*rows, 16)
    y.sum().backward()
    assert layer.weight.grad.shape == (16, 48)


def test_from_linear_shares_the_parameters_of_the_linear():
    linear = nn.Linear(8, 4)
    layer = BitLinear158.from_linear(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert list(layer.state_dict()) == list(linear.state_dict())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_not_frozen(bad):
    layer, _ = make(BitLinear158)
    with torch.no_grad():
        layer.weight[3, 5] = bad
    with pytest.raises(InputError, match="not finite"):
        layer.freeze()


def test_a_nan_in_the_input_gives_a_nan_row_and_spoils_no_other():
    layer, x = make(BitLinear158)
    clean = layer(x)
    x[0, 1, 7] = float("nan")
    y = layer(x)
    assert torch.isnan(y[0, 1]).all()
    assert torch.equal(y[1], clean[1])


def test_frozen_layer_keeps_its_scale_when_the_model_is_cast():
    layer, _ = make(BitLinear158)
    frozen = layer.freeze()
    scale = frozen.weight_scale.clone()
    frozen.bfloat16()
    assert torch.equal(frozen.weight_scale, scale)
    assert frozen.weight_scale.dtype == torch.float32


def test_frozen_layer_survives_its_state_dict():
    layer, x = make(BitLinear158)
    frozen, other = layer.freeze(), make(BitLinear158, seed=1)[0].freeze()
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(x), frozen(x))


def test_without_activation_quantization_the_frozen_layer_multiplies_dequantized_weights():
    layer, x = make(BitLinear158)
    frozen = QuantizedLinear(layer.quantized_weight(), None, activation=None)
    torch.testing.assert_close(frozen(x), x @ layer.quantized_weight().dequantize().T)
    assert QuantizedLinear(layer.quantized_weight(), torch.zeros(16))(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    weight = absmean_ternary(torch.randn(4, 8))
    weight.scale.fill_(scale)
    with pytest.raises(InputError, match="positive and finite"):
        QuantizedLinear(weight)


def test_layer_says_how_it_is_quantized():
    layer = BitLinear158(
        4, 2, quantizer=partial(absmean_ternary, granularity="row"), activation=partial(absmax, bits=4)
    )
    assert "quantizer=absmean_ternary(granularity='row'), activation=absmax(bits=4)" in repr(layer)
