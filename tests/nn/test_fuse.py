"""Layers that read one input, run as one: the same bits, the same bytes."""

import io
from functools import partial

import pytest
import safetensors.torch
import torch
from torch import nn

from bitnet.errors import InputError
from bitnet.nn import BitLinear, BitLinear158, PackedLinear
from bitnet.nn.fuse import fused
from bitnet.quant import absmean_ternary, zero_point

ROWS = (12, 5, 1)


def layers(kind=BitLinear158, columns=37, layout=None, **options) -> list[PackedLinear]:
    found = []
    for rows in ROWS:
        layer = kind(columns, rows, **options)
        nn.init.normal_(layer.weight, std=0.02 * rows)  # each with a scale of its own
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
        found.append(layer.freeze().pack(layout))
    return found


@pytest.mark.parametrize(("kind", "layout"), [(BitLinear158, "i2"), (BitLinear158, "t5"), (BitLinear, "b1")])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_those_of_the_layers_bit_for_bit(kind, layout, bias, dtype):
    parts = layers(kind, layout=layout, bias=bias)
    x = torch.randn(2, 3, 37, dtype=dtype)
    expected = torch.cat([layer(x) for layer in parts], -1)
    call = fused(parts)
    assert torch.equal(call(x), expected)
    assert torch.equal(torch.cat([layer(x) for layer in parts], -1), expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 36), torch.randn(2, 4000), torch.randn(2, 5), torch.ones(2, 37, dtype=torch.int64), torch.ones(())],
)
def test_an_input_that_the_layers_refuse_is_refused(x, grad):
    call = fused(layers())
    with torch.set_grad_enabled(grad), pytest.raises(InputError):
        call(x)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_decides_the_dtype_of_the_answer_as_in_the_layers(grad):
    parts, x = layers(), torch.randn(4, 37)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        found, expected = fused(parts)(x), torch.cat([layer(x) for layer in parts], -1)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_a_gradient_is_refused_as_by_the_layers():
    y = fused(layers())(torch.randn(4, 37, requires_grad=True))
    with pytest.raises(InputError, match="no gradient"):
        y.sum().backward()


def test_a_scale_for_each_row_is_kept():
    parts = layers(quantizer=partial(absmean_ternary, granularity="row"))
    x = torch.randn(4, 37)
    assert torch.equal(fused(parts)(x), torch.cat([layer(x) for layer in parts], -1))


def test_nothing_is_stored_twice_and_nothing_moves_again():
    parts = layers()
    fused(parts)
    places = [layer.weight.packed.data_ptr() for layer in parts]
    width = parts[0].weight.packed.shape[1]
    assert [place - places[0] for place in places] == [0, 12 * width, 17 * width]
    fused(parts)
    assert [layer.weight.packed.data_ptr() for layer in parts] == places


def test_layers_that_only_happen_to_lie_beside_each_other_are_told_by_their_order():
    one, two, three = layers()
    fused([one, two, three])
    x = torch.randn(4, 37)
    assert torch.equal(fused([two, one])(x), torch.cat([two(x), one(x)], -1))
    assert torch.equal(fused([one, two, three])(x), torch.cat([one(x), two(x), three(x)], -1))


def test_the_state_of_a_fused_model_is_what_it_was():
    model = nn.ModuleList(layers())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused(list(model))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_each_layer_is_saved_as_its_own_bytes_alone():
    parts = layers(columns=4000)
    fused(parts)
    for part in parts:
        file = io.BytesIO()
        torch.save(part.state_dict(), file)
        assert file.tell() < part.weight.packed.numel() + 4000
    safetensors.torch.save(nn.ModuleList(parts).state_dict())  # which refuses tensors that share memory


def others() -> dict[str, list[nn.Module]]:
    plain = layers()
    mixed = [*layers(layout="i2")[:1], *layers(layout="t5")[1:]]
    return {
        "dense": [nn.Linear(37, rows) for rows in ROWS],
        "frozen": [BitLinear158(37, rows).freeze() for rows in ROWS],
        "two layouts": mixed,
        "one with a bias": [*plain[:2], *layers(bias=True)[2:]],
        "another quantizer of inputs": layers(activation=zero_point),
        "one dense": [*plain[:2], nn.Linear(37, 1)],
    }


@pytest.mark.parametrize("kind", others())
def test_layers_that_cannot_be_one_are_called_one_by_one(kind):
    parts, x = others()[kind], torch.randn(4, 37)
    places = [layer.weight.packed.data_ptr() for layer in parts if isinstance(layer, PackedLinear)]
    assert torch.equal(fused(parts)(x), torch.cat([layer(x) for layer in parts], -1))
    assert [layer.weight.packed.data_ptr() for layer in parts if isinstance(layer, PackedLinear)] == places


def test_one_layer_alone_is_called_as_it_is():
    layer = nn.Linear(3, 4)
    assert fused([layer]) is layer
    (packed, *_), x = layers(), torch.randn(4, 37)
    assert torch.equal(fused([packed])(x), packed(x))


def test_bytes_that_inference_mode_made_move_to_memory_whose_changes_are_counted():
    [layer, *_] = layers()
    x = torch.randn(3, 37)
    expected = layer(x)
    with torch.inference_mode():
        layer.weight_packed = layer.weight_packed.clone()
    call = fused([layer])
    assert not layer.weight_packed.is_inference()
    assert torch.equal(call(x), expected)
