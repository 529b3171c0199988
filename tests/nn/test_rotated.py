"""Layers whose inputs are turned, or stay in float: the same bits trained, frozen and packed."""

from functools import partial

import pytest
import torch
from torch import nn

import bitnet
from bitnet import BitLinear158, InputError, convert
from bitnet.nn import PackedLinear
from bitnet.nn.fuse import fused
from bitnet.quant import LSQ, Grid, Rotated, RotatedInputs, absmax, absmean_int4, absmean_ternary, rotate

INPUTS = [Rotated(), Rotated(8), Rotated(block=4), Rotated(3, "tensor"), None]


def linear(dtype=torch.float32, seed=0, columns=48):
    torch.manual_seed(seed)
    dense = nn.Linear(columns, 16, dtype=dtype)
    nn.init.normal_(dense.weight, std=0.02)
    x = torch.randn(2, 5, columns, dtype=dtype)
    x[0, 0, 3] = 20
    return dense, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "quantizer", [absmean_ternary, partial(absmean_ternary, granularity=20), Grid(4, True), LSQ(4)]
)
@pytest.mark.parametrize("activation", INPUTS)
def test_the_frozen_layer_answers_bit_for_bit_like_the_trained_one(activation, quantizer, dtype):
    dense, x = linear(dtype)
    layer = BitLinear158.from_linear(dense, quantizer=quantizer, activation=activation)
    frozen = layer.freeze()
    assert torch.equal(layer(x), frozen(x))
    assert layer(x).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), frozen(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", INPUTS)
def test_the_packed_layer_answers_bit_for_bit_like_the_trained_one(activation, dtype):
    dense, x = linear(dtype)
    layer = BitLinear158.from_linear(dense, activation=activation)
    packed = layer.freeze().pack()
    with torch.no_grad():
        assert torch.equal(layer(x), packed(x))
        assert torch.equal(torch.cat([layer(x)] * 2, -1), fused([packed, layer.freeze().pack()])(x))
        assert torch.equal(fused([packed])(x[0]), layer(x[0]))


def test_turned_8_bit_inputs_run_on_the_operator(monkeypatch):
    dense, x = linear()
    packed = BitLinear158.from_linear(dense, activation=Rotated(8)).freeze().pack()
    expected = packed(x)
    monkeypatch.setattr("bitnet.quant.packed.unpack", None)
    assert torch.equal(packed(x), expected)


@pytest.mark.usefixtures("unchecked")
def test_inputs_that_are_no_floats_are_not_turned():
    dense, x = linear()
    packed = BitLinear158.from_linear(dense, activation=Rotated(8)).freeze().pack()
    with pytest.raises(InputError, match="only rows of floating numbers"):
        packed(x.int())


@pytest.mark.parametrize("bias", [True, False])
def test_conversion_keeps_the_dense_function(bias):
    dense, x = linear()
    dense.bias = dense.bias if bias else None
    weight = dense.weight.detach().clone()
    expected = dense(x)
    layer = BitLinear158.from_linear(dense, activation=Rotated())
    assert torch.equal(dense.weight, weight)  # what it came from is as it was
    torch.testing.assert_close(layer.weight, rotate(weight))
    layer.blend(0, 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_a_learned_scale_begins_with_the_turned_weight():
    dense, _ = linear()
    layer = BitLinear158.from_linear(dense, quantizer=LSQ(4, init="absmax"), activation=Rotated())
    assert torch.equal(layer.quantizer.scale, LSQ(4, init="absmax").for_weight(rotate(dense.weight)).scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dense_layer_of_the_quantized_values(dtype):
    dense, x = linear(dtype)
    layer = BitLinear158.from_linear(dense, activation=Rotated())
    x.requires_grad_()
    gradient = torch.randn(2, 5, 16, dtype=dtype)
    layer(x).backward(gradient)
    wq, xq = layer.quantized_weight().dequantize(), layer.activation(x).dequantize()
    flat = gradient.float().flatten(0, 1)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(x.grad.float(), rotate(gradient.float() @ wq), **tolerance)
    torch.testing.assert_close(layer.weight.grad.float(), flat.T @ xq.flatten(0, 1), **tolerance)
    assert x.grad.dtype == layer.weight.grad.dtype == dtype


@pytest.mark.parametrize("quantizer", [Grid(4, True, 20), LSQ(4)])
def test_gradients_of_float_inputs_are_those_of_a_dense_layer_of_the_values(quantizer):
    dense, x = linear()
    layer = BitLinear158.from_linear(dense, quantizer=quantizer, activation=None)
    twin = nn.Linear(48, 16)
    twin.load_state_dict({"weight": layer.quantized_weight().dequantize(), "bias": dense.bias.detach()})
    gradient = torch.randn(2, 5, 16)
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(mine).backward(gradient)
    twin(its).backward(gradient)
    torch.testing.assert_close(mine.grad, its.grad)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad)
    inside = (layer.quantized_weight().qdata > -8) & (layer.quantized_weight().qdata < 7)  # LSQ passes nothing beyond
    torch.testing.assert_close(layer.weight.grad[inside], twin.weight.grad[inside])


def test_weights_alone_cost_one_byte_a_value_beside_the_inputs():
    dense, x = linear()
    layer, kept = BitLinear158.from_linear(dense, activation=None), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    assert sum(t.numel() * t.element_size() for t in kept if t is not x) <= layer.weight.numel() + 4


@pytest.mark.parametrize("activation", INPUTS)
def test_a_warm_up_goes_from_the_dense_function_to_the_same_bits(activation):
    dense, x = linear()
    expected = dense(x)
    layer = BitLinear158.from_linear(dense, activation=activation)
    quantized = layer(x)
    layer.blend(0, 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    layer.blend(1, 0)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(layer_inputs(layer, x), layer.quantized_weight().dequantize(), dense.bias)
    )
    layer.blend(1, 1)
    assert torch.equal(layer(x), quantized)


def layer_inputs(layer, x):
    return layer.activation.rotate(x) if isinstance(layer.activation, Rotated) else x


@pytest.mark.parametrize(("activation", "wide"), [(absmean_int4, absmax), (Rotated(), Rotated(8))])
def test_a_layer_can_quantize_its_inputs_to_8_bits_first(activation, wide):
    dense, x = linear()
    layer = BitLinear158.from_linear(dense, activation=activation)
    narrow = layer(x)
    layer.blend(1, 1, eight_bits=True)
    assert torch.equal(layer(x), BitLinear158.from_linear(dense, activation=wide)(x))
    assert not torch.equal(layer(x), narrow)
    assert layer.warming_up
    with pytest.raises(InputError, match=r"still being warmed up .*, these in 8 bits\)"):
        layer.freeze()
    layer.blend(1, 1)
    assert not layer.warming_up
    assert torch.equal(layer(x), narrow)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj, self.down_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(24, 8)


def test_conversion_turns_the_layers_that_are_named():
    model = Block()
    convert(model, partial(BitLinear158.from_linear, activation=RotatedInputs(["o_proj", "down*"], bits=8)))
    assert model.o_proj.activation == model.down_proj.activation == Rotated(8)
    assert model.q_proj.activation.func is absmax
    assert bitnet.freeze(model) == ["q_proj", "o_proj", "down_proj"]
    bitnet.pack(model)
    assert isinstance(model.o_proj, PackedLinear)


def test_what_cannot_be_turned_is_refused():
    make = partial(BitLinear158.from_linear, activation=RotatedInputs(["up_proj"]))
    with pytest.raises(InputError, match=r"activation\.rotate pattern 'up_proj' matches none"):
        convert(Block(), make)
    with pytest.raises(InputError, match=r"give RotatedInputs to bitnet\.convert"):
        BitLinear158.from_linear(linear()[0], activation=RotatedInputs())
    with pytest.raises(InputError, match="an even width, got 5"):
        BitLinear158(5, 4, activation=Rotated())
    with pytest.raises(InputError, match="only where they end in fewer"):
        BitLinear158(4, 4).blend(1, 1, eight_bits=True)
