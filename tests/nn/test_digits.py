"""A head in 243 levels, by ternary kernels: its definition, exactly, and near the dense head."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitnet.errors import InputError
from bitnet.nn import BitLinear158, QuantizedLinear
from bitnet.nn.digits import LARGEST, DigitLinear, round_head
from bitnet.quant import PackedTensor, absmax


def weight_of(rows=13, columns=300) -> torch.Tensor:
    weight = torch.randn(rows, columns)
    weight[2] = 0
    weight[3, 5] = 40.0  # an outlier
    return weight


def values(layer: DigitLinear) -> torch.Tensor:
    """What the planes stand for, in float64."""
    planes = PackedTensor(layer.packed, layer.scale, "i2", layer.in_features).unpack()
    digits = planes.qdata.double() * planes.scale.double()
    return digits.view(5, layer.out_features, layer.in_features).sum(0)


def test_the_planes_are_the_digits_of_the_nearest_code():
    weight = weight_of()
    step = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / LARGEST
    expected = (weight / step).round().double() * step.double()
    assert torch.allclose(values(DigitLinear(weight)), expected, rtol=1e-6, atol=0)
    assert (values(DigitLinear(weight)) - weight).abs().max() <= step.max() / 2 * (1 + 1e-6)


def test_every_code_has_its_digits():
    codes = torch.arange(-LARGEST, LARGEST + 1).float()
    assert torch.equal(values(DigitLinear(codes[None])), codes.double()[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_answer_is_the_product_of_rounded_inputs_and_weights(dtype, bias):
    layer = DigitLinear(weight_of(), torch.randn(13) if bias else None)
    x = torch.randn(2, 4, 300, dtype=dtype)
    expected = absmax(x.float()).dequantize().double() @ values(layer).T + (0 if layer.bias is None else layer.bias)
    found = layer(x)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def model(tied: bool) -> LlamaForCausalLM:
    shape = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=200, tie_word_embeddings=tied, **shape)).eval()


@pytest.mark.parametrize("kind", ["dense", "tied", "quantized"])
def test_the_rounded_head_of_a_model_answers_nearly_the_same(kind):
    network, ids = model(kind == "tied"), torch.randint(200, (2, 9))
    if kind == "quantized":
        network.lm_head = QuantizedLinear(absmax(network.lm_head.weight.detach()))
    embeddings = network.model.embed_tokens.weight.clone()
    with torch.no_grad():
        expected = network(ids).logits
        round_head(network)
        found = network(ids).logits
    assert isinstance(network.lm_head, DigitLinear)
    assert 0 < (found - expected).std() / expected.std() < 0.02
    assert torch.equal(network.model.embed_tokens.weight, embeddings)


def test_what_is_no_head_in_float_is_refused():
    network = model(False)
    network.lm_head = QuantizedLinear(absmax(network.lm_head.weight.detach()), activation=absmax)
    with pytest.raises(InputError, match="got QuantizedLinear"):
        round_head(network)
    network.lm_head = BitLinear158(64, 200)
    with pytest.raises(InputError, match="got BitLinear158"):
        round_head(network)
    with pytest.raises(InputError, match="got NoneType"):
        round_head(nn.Linear(3, 3))
    with pytest.raises(InputError, match="finite"):
        DigitLinear(torch.tensor([[1.0, float("nan")]]))


def test_moving_to_another_dtype_changes_no_weight():
    layer, x = DigitLinear(weight_of()), torch.randn(3, 300)
    before = layer(x)
    layer.bfloat16()
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer(x), before)
    assert layer.to("meta").scale.is_meta
