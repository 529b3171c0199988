"""Adapters on latent weights: what is trained, what they amount to, and that nothing of them is left in the end."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from bitnet import BitLinear, BitLinear158, convert, freeze
from bitnet.errors import InputError
from bitnet.nn import LatentLoRA, bit_linears, lora_layers, merge_lora, pack
from bitnet.nn.lora import adapter_of, base_name
from bitnet.quant import LSQ


class Net(nn.Module):
    """Embedding, norm, two layers with biases, head."""

    def __init__(self, make=BitLinear158.from_linear):
        super().__init__()
        self.embedding = nn.Embedding(11, 24)
        self.norm = nn.RMSNorm(24)
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24)
        self.head = nn.Linear(24, 11, bias=False)
        convert(self, make, exclude=["head"])

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        hidden = self.embedding(ids)
        return self.head(hidden + self.down(self.up(self.norm(hidden)).relu().square()))


IDS = torch.arange(33).reshape(3, 11) % 11


def trained(make=BitLinear158.from_linear, steps=5, **options):
    """A net with adapters after a few steps of SGD, large enough to turn codes."""
    net = Net(make)
    LatentLoRA(rank=4, alpha=8, **options)(net)
    parameters = [p for p in net.parameters() if p.requires_grad]
    for _ in range(steps):
        net(IDS).logsumexp(-1).mean().backward()
        with torch.no_grad():
            for p in parameters:
                p -= 0.5 * p.grad
                p.grad = None
    return net


@pytest.mark.parametrize(
    "make",
    [
        BitLinear158.from_linear,
        BitLinear.from_linear,
        partial(BitLinear158.from_linear, quantizer=LSQ(4)),
        partial(BitLinear158.from_linear, quantizer=LSQ(2, 10)),
    ],
)
def test_trained_merged_and_frozen_model_answer_bit_for_bit_alike(make):
    torch.manual_seed(1)
    net = trained(make)
    with torch.no_grad():
        codes = [layer.quantized_weight().qdata for _, layer in bit_linears(net)]
        start = [layer.quantizer(layer.parametrizations.weight.original).qdata for _, layer in bit_linears(net)]
        assert not any(map(torch.equal, codes, start)), "no code was turned: the test could not fail"
        answer = net(IDS)
        directly = deepcopy(net)
        freeze(directly)
        assert torch.equal(directly(IDS), answer)
        assert merge_lora(net) == ["up", "down"]
        assert all(type(layer) in (BitLinear, BitLinear158) for _, layer in bit_linears(net))
        assert torch.equal(net(IDS), answer)
        freeze(net)
        assert torch.equal(net(IDS), answer)
        if not isinstance(make, partial):
            pack(net)
            assert torch.equal(net(IDS), answer)
    assert not [name for name, _ in net.named_parameters() if "parametrizations" in name]


def test_at_the_start_the_model_is_the_one_without_adapters():
    net = Net()
    before = net(IDS)
    base = net.up.weight
    LatentLoRA(rank=2)(net)
    assert torch.equal(net(IDS), before)
    assert net.up.parametrizations.weight.original is base


def test_gradients_are_those_of_the_merged_weight_through_the_product():
    torch.manual_seed(2)
    layer = BitLinear158(24, 40, bias=True)
    model = nn.Sequential(layer)
    x, dy = torch.randn(7, 24), torch.randn(7, 40)
    LatentLoRA(rank=4, alpha=8)(model)
    adapter = adapter_of(layer)
    nn.init.normal_(adapter.b, std=0.1)
    plain = BitLinear158(24, 40, bias=True)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    for each in (layer, plain):
        each(x).backward(dy)
    expected = 2 * adapter.b.detach().t() @ plain.weight.grad, 2 * plain.weight.grad @ adapter.a.detach().t()
    torch.testing.assert_close(adapter.a.grad, expected[0])
    torch.testing.assert_close(adapter.b.grad, expected[1])
    assert torch.equal(layer.bias.grad, plain.bias.grad)
    assert layer.parametrizations.weight.original.grad is None


ADAPTERS = {f"{name}.parametrizations.weight.0.{part}" for name in ("up", "down") for part in "ab"}
VECTORS = {"norm.weight", "up.bias", "down.bias"}
SCALES = {"up.quantizer.scale", "down.quantizer.scale"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ADAPTERS | VECTORS | SCALES),
        ({"norms": False}, ADAPTERS | SCALES),
        ({"scales": False}, ADAPTERS | VECTORS),
        ({"head": True}, ADAPTERS | VECTORS | SCALES | {"head.weight"}),
        ({"embeddings": True}, ADAPTERS | VECTORS | SCALES | {"embedding.weight"}),
        ({"include": ["up"]}, {name for name in ADAPTERS if "up" in name} | VECTORS | SCALES),
    ],
)
def test_adapters_are_trained_and_beside_them_what_is_asked_for(options, expected):
    net = Net(partial(BitLinear158.from_linear, quantizer=LSQ(4)))
    LatentLoRA(rank=4, **options)(net)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == expected


def test_a_copy_is_independent_and_a_state_loads():
    net = trained()
    copy = deepcopy(net)
    assert torch.equal(copy(IDS), net(IDS))
    nn.init.normal_(adapter_of(copy.up).b)
    assert not torch.equal(copy(IDS), net(IDS))
    fresh = Net()
    LatentLoRA(rank=4, alpha=8)(fresh)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(IDS), net(IDS))


def test_the_seed_decides_where_the_adapters_start():
    def first(seed):
        net = Net()
        LatentLoRA(rank=4, seed=seed)(net)
        return adapter_of(net.down).a

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_a_base_has_the_name_it_had_before():
    net = Net()
    names = {name for name, _ in net.named_parameters()}
    LatentLoRA(rank=4)(net)
    assert {base_name(name) for name, _ in net.named_parameters()} - ADAPTERS == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 25}, r"at most the smaller side of each layer, got 25 and up with \[40, 24\]"),
        ({"include": ["q_proj"]}, "lora.include pattern 'q_proj' matches none"),
        ({"include": "up"}, r"lora.include must be a list of patterns, such as \[q_proj, layers.0.\*\], got 'up'"),
        ({"include": None}, "lora.include must be a list of patterns.* got None"),
        ({"include": []}, r"lora.include must name a layer or more, such as \[q_proj, v_proj\], got \[\]"),
    ],
)
def test_what_fits_no_layer_is_refused_and_nothing_is_changed(options, message):
    net = Net()
    with pytest.raises(InputError, match=message):
        LatentLoRA(**options)(net)
    assert all(p.requires_grad for p in net.parameters())
    assert not lora_layers(net)
    assert not parametrize.is_parametrized(net.up)


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 2.0}, {"rank": True}, {"alpha": 0}, {"alpha": float("nan")}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=f"lora.{next(iter(options))} must be a positive"):
        LatentLoRA(**options)


def test_a_seed_that_is_no_number_is_refused():
    with pytest.raises(InputError, match=r"lora\.seed must be a whole number, got 'abc'"):
        LatentLoRA(seed="abc")  # pyright: ignore


def test_a_dense_model_an_adapted_one_and_one_without_adapters_are_refused():
    with pytest.raises(InputError, match="goes with layers that are quantized in training"):
        LatentLoRA()(nn.Sequential(nn.Linear(32, 32)))
    net = Net()
    with pytest.raises(InputError, match="no adapters to merge"):
        merge_lora(net)
    LatentLoRA(rank=4)(net)
    with pytest.raises(InputError, match="adapters already"):
        LatentLoRA(rank=4)(net)
