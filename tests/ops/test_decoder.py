"""A step in one call gives the bits of the same step written out with PyTorch's operators, in every tier."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from bitnet.ops import build
from bitnet.ops.decoder import Decoder, Layer, Norm, Shape
from bitnet.ops.native import Matrix, Native
from bitnet.ops.packed_linear import reference_linear
from bitnet.quant import PackedTensor, absmean_ternary, centred_sign

SHAPES = {
    "uneven": (Shape(4, 2, 10, 10**-0.5, "relu2"), 20, 35, 37),  # heads, hidden, inner, vocabulary
    "wide": (Shape(2, 1, 72, 0.2, "silu"), 70, 129, 6),
    "narrow": (Shape(1, 1, 2, 1.0, "silu"), 3, 1, 1),
}


@pytest.fixture(scope="module")
def native() -> Native:
    return Native(build.library())


def matrix(out: int, columns: int, layout: str, bias: bool) -> Matrix:
    weight = torch.randn(out, columns)
    packed = PackedTensor.of(centred_sign(weight) if layout == "b1" else absmean_ternary(weight), layout)
    scale = packed.scale if bias else torch.rand(out, 1)
    return Matrix(packed.packed, scale, torch.randn(out) if bias else None, layout, "absmax", columns)


def model(name: str, layout="i2", bias=False, subs=True, head=True) -> tuple:
    """Two layers, the last norm, a head, and a memory that holds five tokens."""
    torch.manual_seed(3)
    shape, hidden, inner, vocabulary = SHAPES[name]
    width, rows = shape.heads * shape.size, (shape.heads + 2 * shape.key_heads) * shape.size

    def norm(count: int) -> Norm:
        return Norm(torch.rand(count) + 0.5, 1e-5)

    layers = [
        Layer(
            *(norm(hidden), matrix(rows, hidden, layout, bias)),
            *(norm(width) if subs else None, matrix(hidden, width, layout, bias)),
            *(norm(hidden), matrix(2 * inner, hidden, layout, bias)),
            *(norm(inner) if subs else None, matrix(hidden, inner, layout, bias)),
        )
        for _ in range(2)
    ]
    output = (torch.randn(vocabulary, hidden), torch.randn(vocabulary) if bias else None) if head else None
    rooms = [tuple(torch.randn(1, shape.key_heads, 24, shape.size) for _ in "kv") for _ in layers]
    return shape, layers, norm(hidden), output, rooms


def total(products: Tensor) -> Tensor:
    """The sum over the last dimension in 16 lanes, as csrc/lanes.h draws it."""
    padded = torch.nn.functional.pad(products, (0, -products.shape[-1] % 16)).unflatten(-1, (-1, 16))
    lanes = torch.zeros_like(padded[..., 0, :])
    for each in padded.unbind(-2):
        lanes = lanes + each
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, -1)
        lanes = low + high
    return lanes[..., 0]


def exp(x: Tensor) -> Tensor:
    x = x.clamp(-87, 87)
    shifted = x * torch.tensor(1.44269504) + 12582912
    whole = shifted - 12582912
    r = (x - whole * torch.tensor(0.693145752)) - whole * torch.tensor(1.42860677e-6)
    p = torch.tensor(1 / 5040)
    for factor in (720, 120, 24, 6, 2, 1, 1):
        p = p * r + torch.tensor(1 / factor)
    return p * (((shifted.view(torch.int32) - 0x4B400000 + 127) << 23).view(torch.float32))


def normalized(norm: Norm | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    return x * (1 / (total(x * x).double() / len(x) + norm.eps).sqrt()).float() * norm.weight


def linear(m: Matrix, x: Tensor) -> Tensor:
    return reference_linear(x, m.packed, m.scale, m.bias, m.layout, m.activation)


def written_out(shape, layers, norm, head, rooms, x, cos, sin, position):
    half, turned = shape.size // 2, shape.heads + shape.key_heads

    def turn(each: Tensor) -> Tensor:
        return each * cos + torch.cat([-each[..., half:], each[..., :half]], -1) * sin

    for layer, (keys, values) in zip(layers, rooms, strict=True):
        heads = linear(layer.qkv, normalized(layer.norm, x)).view(-1, shape.size)
        keys[0, :, position], values[0, :, position] = turn(heads[shape.heads : turned]), heads[turned:]
        found = []
        for h in range(shape.heads):
            mine = h // (shape.heads // shape.key_heads)
            scores = total(keys[0, mine, : position + 1] * turn(heads[h])) * torch.tensor(shape.scaling)
            weights = exp(scores - scores.max())
            mixed = torch.zeros(shape.size)
            for weight, value in zip(weights, values[0, mine], strict=False):
                mixed = mixed + value * weight
            found.append(mixed / total(weights))
        x = x + linear(layer.o, normalized(layer.o_norm, torch.cat(found)))
        gate, up = linear(layer.gate_up, normalized(layer.norm_2, x)).chunk(2)
        inner = gate.relu().square() if shape.activation == "relu2" else gate / (exp(-gate) + 1)
        x = x + linear(layer.down, normalized(layer.down_norm, inner * up))
    x = normalized(norm, x)
    if head is None:
        return x
    weight, bias = head
    return total(weight * x) if bias is None else total(weight * x) + bias


CASES = [
    *itertools.product(SHAPES, ["i2", "t5", "b1"], [True], [True], [True]),
    *itertools.product(["uneven"], ["i2"], [False], [False], [True, False]),
]


@pytest.mark.parametrize(("name", "layout", "bias", "subs", "head"), CASES)
def test_every_tier_gives_the_bits_of_the_step_written_out(native, name, layout, bias, subs, head):
    *parts, rooms = model(name, layout, bias, subs, head)
    angle = torch.rand(parts[0].size) * 6
    for position in (0, 5, 23):
        x = torch.randn(parts[1][0].qkv.columns)
        expected_rooms = [tuple(each.clone() for each in pair) for pair in rooms]
        expected = written_out(*parts, expected_rooms, x, angle.cos(), angle.sin(), position)
        assert expected.isfinite().all()
        for tier in native.tiers:
            mine, before = [tuple(each.clone() for each in pair) for pair in rooms], x.clone()
            decoder = Decoder(native, tier, *parts)
            decoder.use(mine)
            assert torch.equal(decoder(x, angle.cos(), angle.sin(), position), expected)
            assert torch.equal(x, before)
            for found, wanted in zip(itertools.chain(*mine), itertools.chain(*expected_rooms), strict=True):
                assert torch.equal(found, wanted)


def test_the_number_of_threads_changes_no_bit(native, monkeypatch):
    shape = Shape(8, 4, 64, 0.125, "silu")
    monkeypatch.setitem(SHAPES, "large", (shape, 512, 600, 1000))
    *parts, rooms = model("large")
    rooms = [tuple(torch.randn(1, 4, 200, 64) for _ in "kv") for _ in rooms]
    angle, x, found = torch.rand(64), torch.randn(512), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        decoder = Decoder(native, native.tiers[0], *parts)
        decoder.use(rooms)
        torch.set_num_threads(threads)
        found.append(decoder(x, angle.cos(), angle.sin(), 199))
    torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_none_gives_logits_that_are_none(native, number):
    *parts, rooms = model("uneven")
    decoder = Decoder(native, native.tiers[0], *parts)
    decoder.use(rooms)
    x = torch.randn(20)
    x[7] = number
    assert decoder(x, torch.ones(10), torch.zeros(10), 5).isnan().all()


def test_its_exponential_is_right_to_two_units_of_the_last_place():
    x = torch.linspace(-86, 86, 100_001)
    error = (exp(x).double() / x.double().exp() - 1).abs().max()
    assert error < 2**-22
