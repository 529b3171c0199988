"""Which parameters decay, and which weights are refused."""

import pytest
import torch
from torch import nn
from toy_training import ToyLanguageModel

from bitnet import BitLinear158
from bitnet.errors import InputError
from bitnet.quant import LSQ
from bitnet.training import adamw
from bitnet.training.optim import lost_share


def _decay_by_name(model):
    optimizer = adamw(model, lr=1e-3, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: decay[id(p)] for name, p in model.named_parameters()}


def test_only_matrices_of_linears_decay():
    assert _decay_by_name(ToyLanguageModel()) == {
        "embedding.weight": 0.0,
        "norm.weight": 0.0,
        "up.weight": 0.1,
        "down.weight": 0.1,
        "head.weight": 0.1,
        "head.bias": 0.0,
    }


def test_a_head_tied_to_the_embedding_does_not_decay():
    model = ToyLanguageModel()
    model.head.weight = model.embedding.weight
    assert _decay_by_name(model)["embedding.weight"] == 0.0


def test_a_frozen_parameter_is_left_out():
    model = ToyLanguageModel()
    model.up.weight.requires_grad_(False)
    optimizer = adamw(model, lr=1e-3, weight_decay=0.1)
    assert not any(p is model.up.weight for group in optimizer.param_groups for p in group["params"])


def test_learned_scales_do_not_decay_and_have_a_learning_rate_of_their_own():
    model = ToyLanguageModel()
    model.up = BitLinear158.from_linear(model.up, quantizer=LSQ(4))
    optimizer = adamw(model, lr=1e-3, weight_decay=0.1, scale_lr=0.25)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    settings = {name: found[id(p)] for name, p in model.named_parameters()}
    assert settings["up.quantizer.scale"] == (0.25e-3, 0.0)
    assert settings["up.weight"] == (1e-3, 0.1)
    assert settings["norm.weight"] == (1e-3, 0.0)


@pytest.mark.parametrize("factor", [0, -1.0, float("inf")])
def test_a_learning_rate_of_scales_that_is_not_positive_is_refused(factor):
    with pytest.raises(InputError, match="scale_lr must be a positive number"):
        adamw(ToyLanguageModel(), lr=1e-3, weight_decay=0.1, scale_lr=factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_refused_by_name(dtype):
    model = ToyLanguageModel()
    model.down.to(dtype)
    with pytest.raises(InputError, match=r"float32, got torch.*float16 in down.weight"):
        adamw(model, lr=1e-3, weight_decay=0.1)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(InputError, match="trainable"):
        adamw(nn.Identity(), lr=1e-3, weight_decay=0.1)


def test_half_precision_would_lose_most_updates():
    """The figure that the refusal quotes: lr 2e-5, weights of sigma 0.02, a full-sized Adam step."""
    weight = torch.randn(1_000_000) * 0.02
    half = weight.bfloat16()
    lost = (half - 2e-5 == half).float().mean().item()
    assert lost == pytest.approx(0.695, abs=0.01)


def test_half_precision_is_refused_with_the_share_of_updates_that_it_would_lose():
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(200_000)).bfloat16()
    moved = (weight.double() - 2e-5).bfloat16() != weight
    assert lost_share(weight, 2e-5) == pytest.approx(1 - float(moved.float().mean()), abs=2e-3)
    assert lost_share(weight, 2e-5) == pytest.approx(0.695, abs=5e-3)
    assert lost_share(weight.float(), 2e-5) == 0
    layer = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    with pytest.raises(InputError, match=r"learning rate 1e-05 would leave 100\.0% of them as they are"):
        adamw(layer, lr=1e-5, weight_decay=0.1)
