"""What every quantizer of conf/quantizer does inside a layer; what learned scales do in particular, and the warm-up."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from bitnet import BitLinear158, InputError, convert, freeze
from bitnet.export.codec import restore_weight, store_weight
from bitnet.quant import LSQ, SEQ, LearnedScale, absmax, absmean_ternary

CONF = Path(__file__).parents[2] / "conf" / "quantizer"
NAMES = sorted({path.stem for path in CONF.glob("*.yaml")} - {"none"})
GRANULARITIES = ["tensor", "row", 20]
LEARNED = [LSQ(4), LSQ(3, "tensor"), LSQ(2, 20), SEQ(2), SEQ(1.58, 20)]


def from_yaml(name, **options):
    return instantiate(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), options))


def make(quantizer, dtype=torch.float32, seed=0, **options):
    """A layer as conversion makes it, from a weight with normal tails."""
    torch.manual_seed(seed)
    linear = nn.Linear(48, 16, dtype=dtype)
    nn.init.normal_(linear.weight, std=0.02)
    return BitLinear158.from_linear(linear, quantizer=quantizer, **options), torch.randn(2, 5, 48, dtype=dtype)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_frozen_layer_answers_bit_for_bit_like_the_trained_one(name, dtype, granularity):
    layer, x = make(from_yaml(name, granularity=granularity), dtype)
    assert torch.equal(layer(x), layer.freeze()(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.freeze()(x))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_read_back_from_a_file_has_the_same_codes_and_as_many_bits(name, granularity):
    weight = make(from_yaml(name, granularity=granularity))[0].quantized_weight()
    stored = store_weight(weight, "t5")
    back = restore_weight(stored.entry, stored.tensors)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert getattr(back, "odd", False) == weight.odd
    assert back.bits_per_weight == pytest.approx(weight.bits_per_weight)
    codes = next(tensor for field, tensor in stored.tensors.items() if field in ("codes", "packed"))
    assert codes.numel() * 8 / weight.qdata.numel() <= {2: 1, 3: 1.7, 4: 2, 16: 4, 15: 4, 255: 8}[weight.levels]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_training_moves_the_weights_and_every_learned_scale(name):
    layer, x = make(from_yaml(name))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), 1e-3).step()
    assert all(not torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert torch.equal(layer(x), layer.freeze()(x))


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_zeros_answers_with_its_bias_alone(name):
    linear = nn.Linear(24, 8)
    nn.init.zeros_(linear.weight)
    layer = BitLinear158.from_linear(linear, quantizer=from_yaml(name))
    torch.testing.assert_close(layer(torch.randn(3, 24)), linear.bias.expand(3, 8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("rule", LEARNED)
def test_gradients_of_a_learned_scale_are_those_of_the_formula_applied_to_the_quantized_inputs(rule):
    layer, x = make(rule)
    gradient = torch.randn(2, 5, 16)
    x.requires_grad_()
    layer(x).backward(gradient)

    weight, scale = layer.weight.detach(), layer.quantizer.scale.detach()
    size = rule.granularity if isinstance(rule.granularity, int) else None
    columns = scale if size is None else scale.repeat_interleave(size, -1)[:, :48]
    units, (low, high) = weight / columns, rule.bounds
    inside = ((units > low) & (units < high)).float()
    of_value = gradient.flatten(0, 1).T @ layer.activation(x.detach()).dequantize().flatten(0, 1)
    torch.testing.assert_close(layer.weight.grad, of_value * inside, rtol=1e-5, atol=1e-5)
    terms = of_value * (layer.quantized_weight().qdata - units * inside)
    if size is None:
        sums = terms.sum().reshape(1, 1) if rule.granularity == "tensor" else terms.sum(1, keepdim=True)
        members = torch.tensor(terms.numel() / sums.numel())
    else:
        sums = torch.stack([each.sum(1) for each in terms.split(size, 1)], 1)
        members = torch.tensor([20.0, 20.0, 8.0])
    top = layer.quantized_weight().levels - 1 if rule.odd else (rule.levels - 1) // 2
    torch.testing.assert_close(layer.quantizer.scale.grad, sums / (members * top).sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, gradient @ layer.quantized_weight().dequantize(), rtol=1e-5, atol=1e-6)


def test_each_converted_layer_has_a_scale_of_its_own_that_its_weight_chose():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    weights = [layer.weight.detach().clone() for layer in model]
    convert(model, lambda linear: BitLinear158.from_linear(linear, quantizer=LSQ(4)))
    for layer, weight in zip(model, weights, strict=True):
        assert isinstance(layer.quantizer, LearnedScale)
        torch.testing.assert_close(layer.quantizer.scale, 2 * weight.abs().mean(1, True) / 7**0.5)
    assert [name for name, _ in model.named_parameters() if "scale" in name] == [
        "0.quantizer.scale",
        "1.quantizer.scale",
    ]


@pytest.mark.parametrize("rule", LEARNED)
def test_a_learned_scale_is_restored_with_the_state_of_the_model(rule):
    layer, x = make(rule)
    other, _ = make(rule, seed=1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_a_learned_scale_that_is_not_finite_is_not_frozen():
    layer, _ = make(LSQ(4))
    with torch.no_grad():
        layer.quantizer.scale[3] = float("nan")
    with pytest.raises(InputError, match="finite"):
        layer.freeze()


# The warm-up of the quantization


@pytest.mark.parametrize("quantizer", [absmean_ternary, *LEARNED])
def test_without_a_share_the_layer_is_the_dense_one(quantizer):
    layer, x = make(quantizer)
    layer.blend(0, 0)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("quantizer", [absmean_ternary, *LEARNED])
def test_at_full_shares_the_layer_is_bit_for_bit_the_one_that_never_was_warmed_up(quantizer):
    layer, x = make(quantizer)
    expected = layer(x)
    layer.blend(0.5, 0.5)
    assert not torch.equal(layer(x), expected)
    layer.blend(1, 1)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.freeze()(x), expected)


def test_between_them_weights_and_inputs_are_mixed_in_their_own_shares():
    layer, x = make(absmean_ternary)
    layer.blend(0.25, 0.75)
    weight = layer.weight + 0.25 * (absmean_ternary(layer.weight).dequantize() - layer.weight)
    mixed = x + 0.75 * (absmax(x).dequantize() - x)
    torch.testing.assert_close(layer(x), F.linear(mixed, weight, layer.bias), rtol=1e-5, atol=1e-6)


def test_gradients_pass_straight_through_a_mixed_layer():
    layer, x = make(absmean_ternary)
    layer.blend(0.25, 0.75)
    gradient = torch.randn(2, 5, 16)
    layer(x.requires_grad_()).backward(gradient)
    weight = layer.weight + 0.25 * (absmean_ternary(layer.weight).dequantize() - layer.weight)
    mixed = x + 0.75 * (absmax(x).dequantize() - x)
    torch.testing.assert_close(x.grad, gradient @ weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, gradient.flatten(0, 1).T @ mixed.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", LEARNED)
def test_the_gradient_of_a_learned_scale_grows_with_the_share(rule):
    layer, x = make(rule, activation=lambda x: absmax(x))
    gradient = torch.randn(2, 5, 16)
    layer(x).backward(gradient)
    full, layer.quantizer.scale.grad = layer.quantizer.scale.grad, None
    layer.blend(0.25, 1)
    layer(x).backward(gradient)
    torch.testing.assert_close(layer.quantizer.scale.grad, full / 4, rtol=1e-4, atol=1e-6)


def test_a_mixed_layer_answers_in_the_dtype_of_its_input_or_of_autocast():
    layer, x = make(absmean_ternary, torch.bfloat16)
    layer.blend(0.5, 0.5)
    assert layer(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16


def test_a_layer_in_its_warm_up_is_not_frozen():
    model = nn.Sequential(make(absmean_ternary)[0])
    model[0].blend(0.3, 0)
    with pytest.raises(InputError, match=r"still being warmed up \(share of the weights 0.3, of the inputs 0\)"):
        freeze(model)
    assert isinstance(model[0], BitLinear158)


def test_shares_are_in_no_checkpoint():
    layer, _ = make(absmean_ternary)
    keys = list(layer.state_dict())
    layer.blend(0.5, 0.5)
    assert list(layer.state_dict()) == keys


@pytest.mark.parametrize("shares", [(-0.1, 0), (0, 1.1), (float("nan"), 0)])
def test_a_share_outside_0_to_1_is_refused(shares):
    with pytest.raises(InputError, match="between 0 and 1"):
        make(absmean_ternary)[0].blend(*shares)
