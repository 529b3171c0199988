"""What every method of conf/ptq promises; a new yaml is tested here without a line of its own."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from bitnet.nn import QuantizedLinear
from bitnet.ptq import LayerStats, PTQMethod, RoundToNearest, Statistic
from bitnet.ptq.hessian import relative_error

FILES = sorted(file for file in (Path(__file__).parents[2] / "conf" / "ptq").glob("[!_]*.yaml") if file.stem != "none")
every_method = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def method_of(file: Path) -> PTQMethod:
    return instantiate(OmegaConf.load(file).ptq)  # pyright: ignore[reportAttributeAccessIssue]


def problem(out: int, columns: int) -> tuple[Tensor, LayerStats]:
    weight = torch.randn(out, columns) * 0.05
    weight[0, 0] = 0.7  # an outlier
    x = torch.randn(2 * columns + 50, columns) * torch.rand(columns).exp()
    x = x + torch.randn(len(x), 1) * torch.randn(columns)
    x_fp = x + 0.05 * torch.randn_like(x)
    mean = {"hessian": x.T @ x / len(x), "cross": (x - x_fp).T @ x / len(x), "mean_square": x.square().mean(0)}
    return weight, LayerStats(n_tokens=len(x), absmax=x.abs().amax(0), **mean)


@every_method
def test_a_matrix_of_any_shape_keeps_it(file):
    method = method_of(file)
    for out, columns in ((6, 64), (3, 130), (1, 1), (5, 3), (2, 300)):
        weight, stats = problem(out, columns)
        quantized = method.quantize(weight, stats)
        assert tuple(quantized.shape) == tuple(quantized.dequantize().shape) == (out, columns)
        assert torch.isfinite(quantized.dequantize()).all()
        assert quantized.bits_per_weight > 0.9


@every_method
def test_the_same_call_gives_the_same_weight_and_changes_no_argument(file):
    weight, stats = problem(8, 96)
    before = [weight.clone(), stats.hessian.clone(), stats.cross.clone(), stats.mean_square.clone()]
    one, other = (method_of(file).quantize(weight, stats) for _ in range(2))
    assert torch.equal(one.dequantize(), other.dequantize())
    after = [weight, stats.hessian, stats.cross, stats.mean_square]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@every_method
def test_most_of_what_the_layer_computes_survives(file):
    weight, stats = problem(32, 256)
    quantized = method_of(file).quantize(weight, stats)
    assert relative_error(weight, quantized.dequantize(), stats.hessian) < 0.5
    error = torch.linalg.vector_norm(weight - quantized.dequantize()) / torch.linalg.vector_norm(weight)
    assert 0 < error < 1


@every_method
def test_the_layer_gives_the_weight_back_and_moves_with_its_model(file):
    weight, stats = problem(8, 96)
    quantized: Any = method_of(file).quantize(weight, stats)
    layer = QuantizedLinear(quantized)
    for changed in (layer, layer.bfloat16()):
        for each in fields(quantized):
            one, other = getattr(quantized, each.name), getattr(changed.weight, each.name)
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    x = torch.randn(4, 96)
    assert torch.allclose(layer(x), x @ quantized.dequantize().T, atol=1e-5)


@every_method
def test_bfloat16_weights_are_quantized_as_their_float32_values(file):
    weight, stats = problem(8, 96)
    narrow = weight.bfloat16()
    one, other = method_of(file).quantize(narrow, stats), method_of(file).quantize(narrow.float(), stats)
    assert torch.equal(one.dequantize(), other.dequantize())


@every_method
def test_zeros_stay_zeros(file):
    _, stats = problem(4, 64)
    values = method_of(file).quantize(torch.zeros(4, 64), stats).dequantize()
    assert values.abs().max() < 1e-4


@every_method
def test_what_looks_at_the_text_beats_rounding_to_nearest(file):
    method = method_of(file)
    if Statistic.HESSIAN not in method.requires or method.claimed_bits < 2:
        return  # rounding to nearest has no grid of less than 2 bits
    weight, stats = problem(48, 256)
    nearest = RoundToNearest(symmetric=False, bits=int(method.claimed_bits)).quantize(weight, None)
    quantized = method.quantize(weight, stats)
    assert relative_error(weight, quantized.dequantize(), stats.hessian) < 0.8 * relative_error(
        weight, nearest.dequantize(), stats.hessian
    )
