"""Run by test_compile.py in an interpreter of its own: compiled layers give the bits of eager and frozen ones.

Of its own, because the shape checks that the other tests run under are code that torch.compile cannot trace.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from bitnet import BitLinear, BitLinear158
from bitnet.nn import LatentLoRA
from bitnet.quant import LSQ, SEQ, Grid, absmean_int4, absmean_ternary, zero_point

LAYERS = [
    BitLinear,
    BitLinear158,
    partial(BitLinear158, quantizer=partial(absmean_ternary, granularity="row")),
    partial(BitLinear158, quantizer=partial(absmean_ternary, granularity=20)),
    partial(BitLinear158, activation=zero_point),
    partial(BitLinear158, quantizer=SEQ(2), activation=absmean_int4),
    partial(BitLinear158, quantizer=LSQ(4, 20)),
    partial(BitLinear158, quantizer=Grid(4, symmetric=True, granularity=20)),
]


def check(layer_class: Callable[..., BitLinear], dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    layer = layer_class(96, 40, bias=True, dtype=dtype)
    nn.init.normal_(layer.weight, std=0.02)
    x = torch.randn(3, 7, 96, dtype=dtype)
    eager, frozen = layer(x), layer.freeze()
    compiled = torch.compile(layer, fullgraph=True)(x.requires_grad_())
    assert torch.equal(compiled, eager), "compiled and eager differ"
    assert torch.equal(torch.compile(frozen, fullgraph=True)(x.detach()), eager), "trained and frozen differ"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), frozen(x)), "under autocast they differ"
    compiled.square().sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    layer(x).square().sum().backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(gradient, layer.weight.grad, **tolerance)


def check_warm_up() -> None:
    """A share that changes compiles nothing anew, and the end of the warm-up gives the layer that never had one."""
    torch._dynamo.reset()
    layer, x = BitLinear158(96, 40, quantizer=LSQ(4)), torch.randn(3, 7, 96)
    eager, graphs = layer(x), list[int]()
    layer.blend(0.25, 0.0)
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph)
    for share in (0.25, 0.5, 0.75):
        layer.blend(share, share / 2)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1, "a share compiled the layer again"
    layer.blend(1, 1)
    assert torch.equal(compiled(x), eager), "the end of the warm-up differs"


def check_adapter() -> None:
    """A merged weight is computed as in eager mode: no code is turned by the order of a compiler's additions."""
    torch._dynamo.reset()
    layer, x = BitLinear158(96, 40), torch.randn(3, 7, 96)
    LatentLoRA(rank=8)(nn.ModuleList([layer]))
    nn.init.normal_(layer.parametrizations.weight[0].b, std=0.05)  # pyright: ignore
    compiled = torch.compile(layer, fullgraph=True)(x)
    assert torch.equal(compiled, layer(x)), "an adapted layer differs, compiled and eager"
    assert torch.equal(compiled, layer.freeze()(x)), "an adapted layer differs, trained and frozen"
    compiled.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for layer_class in LAYERS:
        check(layer_class, torch.float32)
    check(BitLinear158, torch.bfloat16)
    check_warm_up()
    check_adapter()
    print("compiled equals eager")
