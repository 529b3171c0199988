"""With the cache a model answers what it answers without, in whatever portions it reads."""

import pytest
import torch
from text_models import BODIES, quantized, tiny
from transformers import DynamicCache

from bitnet.generation import CachedModel, Sampler, Sampling, new_tokens
from bitnet.generation.cache import SMALLEST, GrowingLayer
from bitnet.nn import convert, freeze, pack

IDS = torch.randint(300, (90,), generator=torch.Generator().manual_seed(3)).tolist()


def all_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("portions", [[90], [1] * 20, [5, 60, 1, 24], [63, 1, 1, 25]])
@pytest.mark.parametrize("body", BODIES)
def test_logits_are_those_of_reading_all_at_once(body, portions):
    model = tiny(body).double()  # float64: any difference but rounding shows
    cached, begin = CachedModel(model), 0
    for portion in portions:
        found = cached.read(IDS[begin : begin + portion])
        begin += portion
        assert torch.allclose(found, all_logits(model, IDS[:begin])[-1], rtol=0, atol=1e-12)
    assert cached.ids == IDS[:begin]


@pytest.mark.parametrize(("body", "packed"), [("bitnet", False), ("bitnet", True), ("llama", False), ("qwen2", True)])
def test_greedy_text_is_that_of_reading_all_again_for_every_token(body, packed):
    model = quantized(body, packed=packed)
    expected = list(IDS[:7])
    for _ in range(20):
        expected.append(int(all_logits(model, expected)[-1].argmax()))
    found = new_tokens(CachedModel(model).read, IDS[:7], Sampler(Sampling(temperature=0)), at_most=20, ends=frozenset())
    assert list(found) == expected[7:]
    assert len(set(expected[7:])) > 4


@pytest.mark.parametrize("body", BODIES)
def test_a_quantized_model_answers_the_same_up_to_codes_that_rounding_moves(body):
    model = quantized(body)
    cached, expected = CachedModel(model), all_logits(model, IDS)[50:]
    cached.read(IDS[:50])
    found = torch.stack([cached.read([each]) for each in IDS[50:]])
    spread = expected.std(-1).mean()
    assert (found - expected).square().mean().sqrt() / spread < 0.01
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.98


def test_growing_memory_holds_what_transformers_cache_holds():
    ours, theirs = GrowingLayer(), DynamicCache()
    for length in [3, 1, SMALLEST - 4, 1, 1, 300, 1]:
        keys, values = torch.randn(2, 1, 2, length, 8).unbind()
        values = values[..., :5]  # as in models whose values are narrower
        expected = theirs.update(keys, values, 0)
        found = ours.update(keys, values)
        assert all(torch.equal(*each) for each in zip(found, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
    ours.crop(-10)
    theirs.crop(-10)
    keys, values = torch.randn(2, 1, 2, 4, 8).unbind()
    expected = theirs.update(keys, values[..., :5], 0)
    assert all(torch.equal(*each) for each in zip(ours.update(keys, values[..., :5]), expected, strict=True))


def test_the_memory_moves_seldom():
    layer, places = GrowingLayer(), set()
    for _ in range(1000):
        keys, _ = layer.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))
        places.add(keys.data_ptr())
    assert len(places) <= 5


def test_what_was_read_already_is_kept_as_far_as_it_agrees():
    model = tiny("llama").double()
    cached = CachedModel(model)
    cached.read(IDS[:40])
    other = [*IDS[:25], 7, *IDS[26:50]]
    assert cached.keep(other) == 25
    assert torch.allclose(cached.read(other[25:]), all_logits(model, other)[-1], rtol=0, atol=1e-12)
    assert cached.keep(other) == len(other) - 1  # the last one is read again: its logits are wanted
    assert torch.allclose(cached.read(other[-1:]), all_logits(model, other)[-1], rtol=0, atol=1e-12)


def test_a_sliding_window_forgets_all_rather_than_answer_wrong():
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=300, num_key_value_heads=2, sliding_window=8, **shape)
    model = MistralForCausalLM(config).double().eval()
    cached = CachedModel(model)
    cached.read(IDS[:40])
    assert torch.allclose(cached.read(IDS[40:41]), all_logits(model, IDS[:41])[-1], rtol=0, atol=1e-12)
    assert cached.keep(IDS[:30]) == 0
    assert torch.allclose(cached.read(IDS[:30]), all_logits(model, IDS[:30])[-1], rtol=0, atol=1e-12)


def test_an_interrupted_reading_leaves_nothing_half_read(monkeypatch):
    model = tiny("llama").double()
    cached = CachedModel(model)
    cached.read(IDS[:10])
    last = model.model.layers[1].mlp

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = last.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached.read(IDS[10:20])
    handle.remove()
    assert cached.keep(IDS[:20]) == 0
    assert torch.allclose(cached.read(IDS[:20]), all_logits(model, IDS[:20])[-1], rtol=0, atol=1e-12)


def scaled(body: str, *, packed: bool, by: float):
    model = tiny(body, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(by)
    if packed:
        convert(model)
        freeze(model)
        pack(model)
    return model


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("body", ["bitnet", "qwen2"])
def test_weights_that_were_loaded_after_the_cache_was_made_are_those_that_answer(body, packed, inference):
    model, other = scaled(body, packed=packed, by=1.0), scaled(body, packed=packed, by=20.0)
    with torch.inference_mode(inference):
        cached = CachedModel(model)
        cached.read(IDS[:10])
        cached.read(IDS[10:11])
    model.load_state_dict(other.state_dict())
    expected = [all_logits(other, IDS[:end])[-1] for end in (15, 16)]
    with torch.inference_mode(inference):
        found = [cached.read(IDS[11:15]), cached.read(IDS[15:16])]
    assert cached.ids == IDS[:16]
    for one, it in zip(found, expected, strict=True):
        assert (one - it).std() / it.std() < 0.01
    assert cached.keep(IDS[:16]) == 15
    model.load_state_dict(scaled(body, packed=packed, by=3.0).state_dict())
    assert cached.keep(IDS[:16]) == 0


@pytest.mark.parametrize("change", ["module", "optimizer", "hook"])
def test_a_model_that_was_changed_otherwise_is_taken_as_it_is_now(change):
    model = tiny("llama")
    cached = CachedModel(model)
    cached.read(IDS[:10])
    if change == "module":
        model.model.layers[0].mlp = tiny("llama", seed=5).model.layers[0].mlp
    elif change == "hook":
        model.model.layers[0].mlp.register_forward_hook(lambda _module, _given, output: output * 3)
    else:
        model(torch.tensor([IDS[:10]]), labels=torch.tensor([IDS[:10]])).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.3).step()
    assert cached.keep(IDS[:12]) == 0
    cached.read(IDS[:12])
    assert torch.allclose(cached.read(IDS[12:13]), all_logits(model, IDS[:13])[-1], atol=1e-3)


def test_a_model_that_did_not_change_is_not_read_again():
    for model in (quantized("bitnet", packed=True), tiny("qwen2")):
        cached, other = CachedModel(model), CachedModel(model)
        for each in (cached, other, cached):
            each.keep(IDS[:20])
            each.read(IDS[len(each.ids) : 20])
        assert cached.keep(IDS[:20]) == other.keep(IDS[:20]) == 19
