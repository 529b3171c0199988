"""Blocks that are computed again in the backward pass: the same gradients to the bit, with a teacher listening too."""

from functools import partial

import pytest
import torch

from bitnet import BitLinear158
from bitnet.errors import InputError
from bitnet.models import Size, causal_lm, from_scratch
from bitnet.nn import LatentLoRA, bit_linears
from bitnet.quant import LSQ
from bitnet.training import AttentionRelations, Distillation, HiddenStates, LogitKL

SIZE = Size(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
IDS = torch.arange(24).reshape(2, 12) % 19


def build(checkpointed, layer=BitLinear158.from_linear):
    return causal_lm(vocab_size=19, size=SIZE, layer=layer, gradient_checkpointing=checkpointed).train()


def gradients(model, distillation=None):
    logits = model(input_ids=IDS, use_cache=False).logits
    loss = logits.logsumexp(-1).mean()
    if distillation is not None:
        terms = distillation.losses(logits, {"input_ids": IDS}, torch.ones(IDS.shape, dtype=torch.bool))
        loss = distillation.objective(loss, terms)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert len(one) > 4
    for name, grad in one.items():
        assert torch.equal(grad, other[name]), name


@pytest.fixture
def recomputed(monkeypatch):
    """How often a layer ran, so that a test knows that blocks were computed again."""
    calls = []
    forward = BitLinear158.forward
    monkeypatch.setattr(BitLinear158, "forward", lambda self, x: calls.append(1) or forward(self, x))
    return calls


@pytest.mark.parametrize("layer", [BitLinear158.from_linear, partial(BitLinear158.from_linear, quantizer=LSQ(4)), None])
def test_gradients_are_the_same_bits(layer):
    assert_same(gradients(build(False, layer)), gradients(build(True, layer)))


def test_blocks_are_computed_again(recomputed):
    gradients(build(False))
    once = len(recomputed)
    gradients(build(True))
    assert len(recomputed) == 3 * once


def test_a_layer_in_its_warm_up_has_the_same_gradients():
    def blended(checkpointed):
        model = build(checkpointed)
        for _, layer in bit_linears(model):
            layer.blend(0.5, 0.25)
        return gradients(model)

    assert_same(blended(False), blended(True))


def test_adapters_have_the_same_gradients():
    def adapted(checkpointed):
        model = build(checkpointed)
        LatentLoRA(rank=4)(model)
        return gradients(model)

    assert_same(adapted(False), adapted(True))


def test_a_teacher_sees_the_same_and_keeps_nothing_of_what_is_computed_again(recomputed):
    def distilled(checkpointed):
        torch.manual_seed(5)
        teacher = from_scratch(body="llama", size=SIZE, vocab_size=19, hidden_act="silu")
        distillation = Distillation(
            teacher, logits=LogitKL(), hidden=HiddenStates(layers=(0,)), relations=AttentionRelations(layer=0)
        )
        model = build(checkpointed)
        distillation.attach(model)
        found = gradients(model, distillation)
        assert distillation._student.take() == {}
        return found

    one = distilled(False)
    count = len(recomputed)
    assert_same(one, distilled(True))
    assert len(recomputed) > 2 * count


def test_evaluation_computes_once(recomputed):
    build(True).eval()(input_ids=IDS, use_cache=False)
    assert len(recomputed) == len(bit_linears(build(False)))


def test_a_model_without_such_blocks_is_refused(monkeypatch):
    model = build(False)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match="no blocks that transformers can compute again"):
        build(True)
