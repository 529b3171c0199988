"""A packed layer answers like the frozen one, to the bit, and holds nothing but bytes and scales."""

from functools import partial

import pytest
import torch
from torch import nn

from bitnet.errors import InputError
from bitnet.nn import BitLinear, BitLinear158, PackedLinear, QuantizedLinear, convert, freeze, pack
from bitnet.nn.packed_linear import known_activation
from bitnet.quant import PackedTensor, QTensor, absmax, absmax_b1, absmean_ternary, zero_point

LAYERS = [(BitLinear158, "i2"), (BitLinear158, "t5"), (BitLinear, "b1")]


def frozen(kind=BitLinear158, columns=48, rows=7, **options) -> QuantizedLinear:
    layer = kind(columns, rows, **options)
    nn.init.normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer.freeze()


@pytest.mark.parametrize(("kind", "layout"), LAYERS)
@pytest.mark.parametrize("columns", [1, 3, 48, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_answers_bit_for_bit_like_the_frozen_one(kind, layout, columns, dtype, bias):
    layer = frozen(kind, columns, bias=bias)
    x = torch.randn(2, 5, columns, dtype=dtype)
    x[0, 0] = 0
    packed = layer.pack(layout)
    assert isinstance(packed, PackedLinear)
    assert packed(x).dtype == dtype
    assert torch.equal(packed(x), layer(x))


@pytest.mark.parametrize(
    "activation", [zero_point, partial(absmax, bits=4), partial(absmax, granularity="tensor"), None]
)
def test_with_any_other_quantizer_of_inputs_it_answers_the_same_too(activation):
    layer = frozen(activation=activation) if activation else frozen()
    layer.activation = activation
    x = torch.randn(5, 48)
    assert torch.equal(layer.pack()(x), layer(x))


def test_a_scale_for_each_row_is_kept():
    layer = frozen(quantizer=partial(absmean_ternary, granularity="row"))
    x = torch.randn(5, 48)
    assert torch.equal(layer.pack()(x), layer(x))
    assert layer.pack().weight.scale.shape == (7, 1)


def test_under_autocast_the_answers_are_the_frozen_layers_as_well():
    layer, x = frozen(), torch.randn(5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = layer(x), layer.pack()(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("layout", "bits"), [("i2", 2.0), ("t5", 1.6)])
def test_stored_bits_are_those_of_the_layout_and_one_scale(layout, bits):
    weight = frozen(columns=320, rows=64).pack(layout).weight
    assert weight.bits_per_weight == bits + 32 / (320 * 64)


def test_moving_to_another_dtype_changes_neither_bytes_nor_scale():
    packed = frozen().pack()
    before = packed.weight.scale.clone()
    packed.bfloat16()
    assert packed.weight.packed.dtype == torch.uint8
    assert torch.equal(packed.weight.scale, before)


def test_on_the_meta_device_it_answers_with_a_shape():
    y = frozen().pack().to("meta")(torch.randn(5, 48, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype) == ((5, 7), torch.bfloat16)


def test_a_model_is_packed_layer_by_layer_and_the_rest_stays():
    model = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8))
    convert(model, include=["0"])
    freeze(model)
    x = torch.randn(5, 48)
    before = model(x)
    assert pack(model, "t5") == ["0"]
    assert torch.equal(model(x), before)
    with pytest.raises(InputError, match="no frozen layer"):
        pack(model)


def test_codes_that_are_not_ternary_are_refused():
    with pytest.raises(InputError, match="255 levels"):
        PackedTensor.of(absmax(torch.randn(4, 8)))
    with pytest.raises(InputError, match="group size 4"):
        PackedTensor.of(absmean_ternary(torch.randn(4, 8), granularity=4))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_and_finite_is_refused(scale):
    weight = QTensor(torch.ones(2, 4, dtype=torch.int8), torch.full((1, 1), scale), 3)
    with pytest.raises(InputError, match="positive and finite"):
        PackedLinear(PackedTensor.of(weight))


def test_the_operator_knows_its_quantizers_by_what_they_compute():
    assert known_activation(absmax) == "absmax"
    assert known_activation(partial(absmax, bits=8, granularity="row")) == "absmax"
    assert known_activation(absmax_b1) == "absmax_b1"
    assert known_activation(partial(absmax, bits=4)) is None
    assert known_activation(zero_point) is None
    assert known_activation(None) is None
