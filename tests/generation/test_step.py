"""One token through our own step is one token through transformers."""

import pytest
import torch
from text_models import BODIES, quantized, tiny
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bitnet.generation import CachedModel
from bitnet.generation.native import NativeStep
from bitnet.generation.step import OneToken, _norm, knows
from bitnet.nn.digits import round_head
from bitnet.ops.cpu import Choice

IDS = torch.randint(300, (60,), generator=torch.Generator().manual_seed(3)).tolist()


def both(model, ids=IDS, prompt=20):
    """Logits of the tokens after a prompt, one by one: by our step, and by transformers."""
    found = []
    for own in (True, False):
        cached = CachedModel(model)
        assert cached._step is not None
        cached._step = cached._step if own else None
        cached.read(ids[:prompt])
        found.append(torch.stack([cached.read([each]) for each in ids[prompt:]]))
    return found


@pytest.mark.parametrize("body", BODIES)
def test_a_dense_step_differs_by_rounding_only(body):
    ours, theirs = both(tiny(body))
    assert torch.allclose(ours, theirs, rtol=0, atol=3e-5 * theirs.abs().max())
    ours, theirs = both(tiny(body).double())
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-13 * theirs.abs().max())


@pytest.mark.parametrize("body", BODIES)
def test_a_step_in_bfloat16_rounds_where_transformers_rounds(body):
    ours, theirs = both(tiny(body).bfloat16())
    assert ours.dtype == torch.bfloat16
    assert (ours - theirs).float().std() / theirs.float().std() < 0.02


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_a_quantized_step_differs_by_codes_that_rounding_moves(body, packed):
    ours, theirs = both(quantized(body, packed=packed))
    assert (ours - theirs).std() / theirs.std() < 0.01
    assert (ours - theirs).abs().median() / theirs.std() < 1e-5  # most tokens move no code
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.95


def test_packed_layers_that_read_one_input_are_fused():
    model = quantized("bitnet", packed=True)
    CachedModel(model)
    layer = model.model.layers[0]
    for one, next in [("self_attn.q_proj", "self_attn.k_proj"), ("mlp.gate_proj", "mlp.up_proj")]:
        first, second = layer.get_submodule(one).weight.packed, layer.get_submodule(next).weight.packed
        assert second.data_ptr() == first.data_ptr() + first.numel()


@pytest.mark.parametrize("change", ["none", "eager", "hook", "extra module", "other body"])
def test_a_model_that_is_not_wholly_known_goes_through_transformers(change):
    model = tiny("llama")
    if change == "eager":
        model.set_attn_implementation("eager")
    elif change == "hook":
        model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    elif change == "extra module":
        model.model.layers[1].self_attn.q_norm = torch.nn.LayerNorm(12)
    elif change == "other body":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=96)).eval()
    assert knows(model) == (change == "none")
    cached = CachedModel(model)
    assert (cached._step is None) == (change != "none")
    cached.read(IDS[:20])
    with torch.no_grad():
        expected = model(torch.tensor([IDS[:21]])).logits[0, -1]
    assert torch.allclose(cached.read(IDS[20:21]), expected, atol=1e-4)


def steps(model) -> list[CachedModel]:
    """The same model with its step in one call, and by PyTorch's operators."""
    found = [CachedModel(model), CachedModel(model)]
    assert type(found[0]._step) is NativeStep
    found[1]._step = OneToken(model)
    return found


@pytest.mark.parametrize("head", ["stored", "int8"])
@pytest.mark.parametrize("body", BODIES)
def test_a_packed_model_steps_in_one_call_and_differs_by_codes_that_rounding_moves(body, head):
    model = quantized(body, packed=True)
    if head == "int8":
        round_head(model)
    found = list[torch.Tensor]()
    for cached in steps(model):
        cached.read(IDS[:20])
        once = [cached.read([each]) for each in IDS[20:]]  # and on, beyond the memory of 64 tokens
        again = [cached.read([each]) for each in IDS[:30]]
        assert cached.keep(IDS[:40]) == 39
        found.append(torch.stack([*once, *again, cached.read(IDS[39:40])]))
    ours, theirs = found
    assert (ours - theirs).std() / theirs.std() < 0.02
    assert (ours - theirs).abs().median() / theirs.std() < 1e-5
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.95


def test_under_autocast_the_step_is_that_of_the_operators():
    found = list[torch.Tensor]()
    for cached in steps(quantized("llama", packed=True)):
        with torch.autocast("cpu", torch.bfloat16):
            cached.read(IDS[:20])
            found.append(cached.read(IDS[20:21]))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["dense", "frozen", "bfloat16", "one dense layer", "gelu", "eager kernels"])
def test_what_the_kernels_cannot_compute_steps_by_operators(kind, monkeypatch):
    model = tiny("llama") if kind == "dense" else quantized("llama", packed=kind != "frozen")
    if kind == "bfloat16":
        model.bfloat16()
    elif kind == "one dense layer":
        model.model.layers[1].mlp.down_proj = torch.nn.Linear(80, 48)
    elif kind == "gelu":
        model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    elif kind == "eager kernels":
        monkeypatch.setattr("bitnet.generation.native.choice", lambda: Choice("reference"))
    assert type(CachedModel(model)._step) is OneToken


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_row_of_zeros_is_normalized_as_the_model_normalizes_it(eps):
    norm = LlamaRMSNorm(8, eps)
    assert torch.equal(_norm(norm, recorded=False)(torch.zeros(1, 1, 8)).isnan(), norm(torch.zeros(1, 1, 8)).isnan())
