"""Outliers move from the inputs into the weights, and the model answers as before."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitnet.errors import InputError
from bitnet.ptq.smoothquant import smooth_, smoothing_pairs


def toy(kv_heads: int = 2, **options) -> nn.Module:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=kv_heads, attn_implementation="eager", **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


IDS = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(1))


def pairs_of(model: nn.Module, **options) -> list[tuple[str, list[str]]]:
    return smoothing_pairs(model.model.layers[0], lambda: model(IDS).logits, **options)


def largest_inputs(model: nn.Module, name: str) -> torch.Tensor:
    seen = []
    module = model.model.layers[0].get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).abs().amax(0)))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen[0]


def test_pairs_of_a_block_are_found_without_a_list_of_names():
    norms = [
        ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
    ]
    assert pairs_of(toy()) == norms
    through = dict(pairs_of(toy(), through_linears=True))
    assert through == dict(norms) | {"mlp.up_proj": ["mlp.down_proj"]}  # two heads share each v: it cannot take s


def test_values_can_take_the_scales_of_the_output_projection_where_every_head_has_its_own():
    assert dict(pairs_of(toy(kv_heads=4), through_linears=True))["self_attn.v_proj"] == ["self_attn.o_proj"]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_model_answers_as_before(alpha, kv_heads):
    model = toy(kv_heads, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        before = model(IDS).logits
        block = model.model.layers[0]
        block.input_layernorm.weight[3] *= 50
        outlier = model(IDS).logits
        weights = copy.deepcopy(model.state_dict())
        for producer, linears in pairs_of(model, through_linears=True):
            modules = [block.get_submodule(name) for name in linears]
            smooth_(block.get_submodule(producer), modules, largest_inputs(model, linears[0]), alpha)
        after = model(IDS).logits
    assert not torch.allclose(before, outlier)
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], block.mlp.up_proj.weight)
    torch.testing.assert_close(after, outlier, rtol=1e-10, atol=1e-10)


def test_half_way_inputs_and_weights_have_the_same_largest_magnitudes():
    model = toy()
    block = model.model.layers[0]
    linears = [block.mlp.gate_proj, block.mlp.up_proj]
    x, w = largest_inputs(model, "mlp.up_proj"), torch.stack([each.weight.detach().abs().amax(0) for each in linears])
    s = smooth_(block.post_attention_layernorm, linears, x, 0.5)
    torch.testing.assert_close(s, (x / w.amax(0)).sqrt())
    smoothed = torch.stack([each.weight.detach().abs().amax(0) for each in linears]).amax(0)
    torch.testing.assert_close(largest_inputs(model, "mlp.up_proj"), smoothed)


def test_a_column_without_inputs_or_without_weights_keeps_its_scale():
    norm, linear = nn.LayerNorm(6), nn.Linear(6, 4)
    with torch.no_grad():
        linear.weight[:, 1] = 0.0
    absmax = torch.tensor([1.0, 2.0, 0.0, 4.0, 1e-9, 3.0])
    s = smooth_(norm, [linear], absmax, 0.7)
    assert s[1] == s[2] == 1.0
    assert torch.isfinite(linear.weight).all()
    assert (s > 0).all()


def test_the_bias_of_a_layer_norm_is_divided_too():
    norm, linear = nn.LayerNorm(6), nn.Linear(6, 4)
    nn.init.normal_(norm.bias)
    x = torch.randn(5, 6)
    before = linear(norm(x))
    smooth_(norm, [linear], torch.rand(6) * 9 + 0.1, 0.5)
    torch.testing.assert_close(linear(norm(x)), before)


class OneMore(nn.RMSNorm):
    """Multiplies by 1 + weight, as Gemma's does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, 1e-6)


class PostNorm(nn.Module):
    """The norm's output is also the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return y + self.linear(y)


def test_a_norm_that_adds_one_to_its_weight_and_one_with_other_readers_make_no_pair():
    x = torch.randn(3, 8)
    gemma, plain = nn.Sequential(OneMore(8), nn.Linear(8, 8)), nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8))
    assert smoothing_pairs(gemma, lambda: gemma(x)) == []
    assert smoothing_pairs(plain, lambda: plain(x)) == [("0", ["1"])]
    post = PostNorm()
    assert smoothing_pairs(post, lambda: post(x)) == []


def test_looking_for_pairs_changes_nothing():
    model = toy()
    before = copy.deepcopy(model.state_dict())
    pairs_of(model, through_linears=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_block_that_is_not_deterministic_is_refused():
    block = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8), nn.Dropout(0.5))
    x = torch.randn(3, 8)
    with pytest.raises(InputError, match="evaluation mode"):
        smoothing_pairs(block, lambda: block(x))


@pytest.mark.parametrize(
    ("absmax", "alpha", "message"),
    [(torch.ones(6), 1.5, "alpha"), (torch.ones(5), 0.5, "does not fit"), (torch.full((6,), torch.nan), 0.5, "finite")],
)
def test_arguments_that_do_not_fit_are_refused(absmax, alpha, message):
    with pytest.raises(InputError, match=message):
        smooth_(nn.RMSNorm(6), [nn.Linear(6, 4)], absmax, alpha)
