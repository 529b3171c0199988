"""Conversion takes exactly the layers that were asked for, and says so when there are none."""

import pytest
import torch
from torch import nn

import bitnet
from bitnet import BitLinear, BitLinear158, InputError, QuantizedLinear
from bitnet.nn import bit_linears


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.down_proj(self.q_proj(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


NAMES = ["layers.0.q_proj", "layers.0.down_proj", "layers.1.q_proj", "layers.1.down_proj"]


def test_by_default_every_linear_but_the_head_is_converted():
    model = Model()
    assert bitnet.convert(model) == NAMES
    assert [name for name, _ in bit_linears(model)] == NAMES
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["q_proj"], None, NAMES[::2]),
        (["layers.1.*"], None, NAMES[2:]),
        (["*"], ["lm_head", "layers.0.*"], NAMES[2:]),
        (["*"], ["down_proj"], [*NAMES[::2], "lm_head"]),
    ],
)
def test_patterns_choose_layers_by_the_end_of_their_names(include, exclude, expected):
    assert bitnet.convert(Model(), include=include, exclude=exclude) == expected


@pytest.mark.parametrize("options", [{"include": "q_proj"}, {"exclude": "q_proj"}, {"include": None}])
def test_patterns_that_are_no_list_are_refused_and_no_letter_is_taken_for_one(options):
    with pytest.raises(InputError, match=r"(in|ex)clude must be a list of patterns, such as \[q_proj, layers"):
        bitnet.convert(Model(), **options)


@pytest.mark.parametrize(("include", "exclude"), [(["v_proj"], None), (["*"], ["v_proj"])])
def test_a_pattern_that_matches_nothing_is_an_error(include, exclude):
    with pytest.raises(InputError, match=r"pattern 'v_proj' matches none of the linear layers: layers\.0"):
        bitnet.convert(Model(), include=include, exclude=exclude)


def test_nothing_left_to_convert_is_an_error():
    with pytest.raises(InputError, match="no linear layer to convert"):
        bitnet.convert(Model(), include=["lm_head"])


def test_converting_twice_finds_nothing_more():
    model = Model()
    bitnet.convert(model)
    with pytest.raises(InputError, match="no linear layer to convert"):
        bitnet.convert(model)


def test_a_tied_weight_is_not_converted_in_silence():
    model = Model()
    model.lm_head.weight = model.embed.weight
    with pytest.raises(InputError, match=r"embed\.weight and lm_head\.weight are one parameter"):
        bitnet.convert(model, exclude=["q_proj"])
    assert type(model.layers[0].down_proj) is nn.Linear


def test_freezing_a_model_keeps_its_answers_bit_for_bit():
    model = Model()
    bitnet.convert(model, BitLinear158.from_linear)
    ids = torch.randint(0, 11, (2, 6))
    before = model(ids)
    assert bitnet.freeze(model) == NAMES
    assert isinstance(model.layers[0].q_proj, QuantizedLinear)
    assert torch.equal(model(ids), before)


def test_freezing_names_the_layer_that_is_not_finite_and_freezes_nothing():
    model = Model()
    bitnet.convert(model, BitLinear.from_linear)
    with torch.no_grad():
        model.layers[1].q_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.q_proj: the weight has values that are not finite"):
        bitnet.freeze(model)
    assert len(bit_linears(model)) == 4


def test_a_layer_alone_is_told_how_to_be_replaced():
    with pytest.raises(InputError, match=r"use BitLinear158\.from_linear"):
        bitnet.convert(nn.Linear(4, 4))
    with pytest.raises(InputError, match=r"use layer\.freeze"):
        bitnet.freeze(BitLinear158(4, 4))


def test_freezing_a_dense_model_is_an_error():
    with pytest.raises(InputError, match="no BitLinear to freeze"):
        bitnet.freeze(Model())


def test_a_model_without_linear_layers_is_refused_in_these_words():
    with pytest.raises(InputError, match="the model has no linear layers"):
        bitnet.convert(nn.Sequential(nn.LayerNorm(4), nn.ReLU()))
