"""Compiled layers give the bits of eager ones, in one graph, without a host synchronisation."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from bitnet import BitLinear, BitLinear158


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile uses what torch deprecates
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_class", [BitLinear, BitLinear158])
def test_compiled_layer_equals_eager_and_frozen_bit_for_bit_in_one_graph(layer_class, dtype):
    torch._dynamo.reset()
    layer = layer_class(96, 40, bias=True, dtype=dtype)
    nn.init.normal_(layer.weight, std=0.02)
    x = torch.randn(3, 7, 96, dtype=dtype)
    eager, frozen = layer(x), layer.freeze()
    compiled = torch.compile(layer, fullgraph=True)(x.requires_grad_())
    assert torch.equal(compiled, eager)
    assert torch.equal(torch.compile(frozen, fullgraph=True)(x.detach()), eager)
    compiled.square().sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    layer(x).square().sum().backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(gradient, layer.weight.grad, **tolerance)


@pytest.mark.parametrize("layer_class", [BitLinear, BitLinear158])
def test_forward_and_backward_never_wait_for_the_device(layer_class):
    with FakeTensorMode():  # a fake tensor has no value: .item(), or a branch on one, would raise
        layer = layer_class(16, 8)
        layer(torch.randn(2, 16)).sum().backward()
    assert layer.weight.grad.shape == (8, 16)
