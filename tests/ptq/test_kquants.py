"""k-quants as a method: what it asks for, error feedback on their grids, sweeps."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq import KQuant, LayerStats, Statistic
from bitnet.ptq.compensation import compensate, sweep
from bitnet.ptq.hessian import inverse_factor, relative_error
from bitnet.ptq.kquants import TYPE_OF_BITS, BlockColumns
from bitnet.quant.ggml import FORMATS, GGMLWeight, fit_fields, magnitude_weighted

TYPES = sorted(FORMATS)


def stats_of(columns: int, seed: int = 0, dead: int | None = None) -> LayerStats:
    """Of correlated inputs of very different sizes, as in a language model."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(3 * columns + 50, columns, generator=generator) @ mixing
    x *= torch.rand(columns, generator=generator).exp()
    if dead is not None:
        x[:, dead] = 0
    hessian = x.T @ x / len(x)
    return LayerStats(n_tokens=len(x), hessian=hessian, mean_square=hessian.diagonal().clone())


def weight_of(rows: int, columns: int) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.05
    weight[0] = 0
    weight[-1, -1] = 0.7
    return weight


def loss(weight: Tensor, method: KQuant, stats: LayerStats) -> float:
    assert stats.hessian is not None
    return relative_error(weight, method.quantize(weight, stats).dequantize(), stats.hessian)


@pytest.mark.parametrize("name", TYPES)
def test_without_feedback_it_is_the_search_with_the_inputs_mean_squares(name):
    weight, stats = weight_of(5, 300), stats_of(300)
    importance = magnitude_weighted(weight, FORMATS[name], stats.mean_square)
    expected = GGMLWeight.from_fields(fit_fields(weight, FORMATS[name], importance), name, 300)
    assert torch.equal(KQuant(type=name).quantize(weight, stats).data, expected.data)


@pytest.mark.parametrize("name", TYPES)
def test_feedback_over_inputs_without_correlation_changes_nothing(name):
    columns = FORMATS[name].block  # more, and the importance is scaled to its mean over each block, not over the row
    weight, stats = weight_of(5, columns), stats_of(columns)
    assert stats.mean_square is not None
    diagonal = LayerStats(n_tokens=1, hessian=torch.diag(stats.mean_square), mean_square=stats.mean_square)
    plain = KQuant(type=name).quantize(weight, diagonal)
    assert torch.equal(KQuant(type=name, feedback=True).quantize(weight, diagonal).dequantize(), plain.dequantize())


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q4_0", "TQ2_0"])
def test_within_a_super_block_it_is_the_textbook_loop(name):
    form = FORMATS[name]
    n = form.block
    weight, stats = weight_of(6, n), stats_of(n)
    assert stats.hessian is not None
    fields = fit_fields(weight, form, magnitude_weighted(weight, form, stats.hessian.diagonal()))
    steps = fields.steps()[:, 0].double().repeat_interleave(form.sub, -1)
    offsets = fields.offsets()
    offset = torch.zeros_like(steps) if offsets is None else offsets[:, 0].double().repeat_interleave(form.sub, -1)
    damped = stats.hessian.double() + 0.01 * stats.hessian.double().diagonal().mean() * torch.eye(n)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    work, values = weight.double().clone(), torch.zeros(6, n, dtype=torch.float64)
    for j in range(n):
        codes = torch.where(steps[:, j] == 0, 0.0, (work[:, j] + offset[:, j]) / steps[:, j])
        values[:, j] = codes.round().clamp(form.low, form.high) * steps[:, j] - offset[:, j]
        error = (work[:, j] - values[:, j]) / upper[j, j]
        work[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
    ours = KQuant(type=name, feedback=True).quantize(weight, stats).dequantize()
    same = (ours - values).abs() < 0.01 * steps.abs() + 1e-9
    assert same.double().mean() > 0.998  # float32 against float64: a tie may fall to the other side


@pytest.mark.parametrize(("name", "factor"), [("Q2_K", 0.7), ("Q3_K", 0.7), ("Q4_K", 0.8), ("TQ1_0", 0.7)])
def test_feedback_lowers_the_outputs_error(name, factor):
    weight, stats = weight_of(24, 512), stats_of(512)
    assert loss(weight, KQuant(type=name, feedback=True), stats) < factor * loss(weight, KQuant(type=name), stats)


@pytest.mark.parametrize("name", TYPES)
def test_no_sweep_raises_the_outputs_error(name):
    weight, stats = weight_of(12, 300), stats_of(300)
    assert stats.hessian is not None
    damped = stats.hessian + 0.01 * stats.hessian.diagonal().mean() * torch.eye(300)
    codes = [KQuant(type=name, feedback=True, sweeps=n).quantize(weight, stats) for n in (0, 1, 3)]
    losses = [relative_error(weight, each.dequantize(), damped) for each in codes]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("factor", [1.0, 1.03])
def test_refitting_scales_lowers_the_error_and_follows_a_target_that_was_scaled(name, factor):
    columns = FORMATS[name].block
    weight, stats = weight_of(6, columns), stats_of(columns)
    hessian = stats.hessian
    assert hessian is not None
    grid = BlockColumns(FORMATS[name], (columns, 6), hessian.diagonal())
    values = compensate(weight.t().contiguous(), inverse_factor(hessian, 0.01).upper, grid)
    target = weight.t() if factor == 1 else factor * values
    refitted = grid.refit(0, values, hessian @ (target - values), hessian)
    before, after = (relative_error(target.t(), each.t(), hessian) for each in (values, refitted))
    both = FORMATS[name].mins is not None  # d and dmin in turn: it takes several rounds to follow
    assert after < (1.0 if factor == 1 else 0.9 if both else 0.35) * before
    assert torch.equal(GGMLWeight.from_fields(grid.fields(), name, columns).dequantize(), refitted.t())


@pytest.mark.parametrize("name", TYPES)
def test_the_bytes_hold_the_values_that_the_loop_compensated_for(name):
    weight, stats = weight_of(6, 300), stats_of(300)
    assert stats.hessian is not None
    grid = BlockColumns(FORMATS[name], (300, 6), stats.hessian.diagonal())
    columns = weight.t().contiguous()
    values = compensate(columns.clone(), inverse_factor(stats.hessian, 0.01).upper, grid)
    assert torch.equal(GGMLWeight.from_fields(grid.fields(), name, 300).dequantize(), values.t())
    values = sweep(columns, values, stats.hessian, grid)
    assert torch.equal(GGMLWeight.from_fields(grid.fields(), name, 300).dequantize(), values.t())


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 257)])
@pytest.mark.parametrize("options", [{}, {"feedback": True, "sweeps": 1}])
def test_any_width_is_quantized_and_arguments_stay_as_they_were(name, shape, options):
    weight, stats = weight_of(*shape), stats_of(shape[1], dead=0 if shape[1] > 1 else None)
    before = weight.clone()
    method = KQuant(type=name, **options)
    q = method.quantize(weight, stats)
    assert q.shape == shape
    assert torch.isfinite(q.dequantize()).all()
    assert torch.equal(weight, before)
    assert torch.equal(method.quantize(weight, stats).data, q.data)
    zeros = method.quantize(torch.zeros(shape), stats)
    assert torch.equal(zeros.dequantize(), torch.zeros(shape))


@pytest.mark.parametrize("options", [{}, {"feedback": True, "sweeps": 1}])
def test_bfloat16_weights_are_quantized_as_their_float32_values(options):
    weight, stats = weight_of(4, 256).bfloat16(), stats_of(256)
    method = KQuant(type="Q2_K", **options)
    assert torch.equal(method.quantize(weight, stats).data, method.quantize(weight.float(), stats).data)


@pytest.mark.parametrize("bits", sorted(TYPE_OF_BITS))
def test_bits_name_a_type_and_the_claim_is_what_full_blocks_store(bits):
    method = KQuant(bits=bits, importance=False)
    q = method.quantize(weight_of(2, 256), None)
    assert q.type == TYPE_OF_BITS[bits]
    assert method.claimed_bits == q.bits_per_weight


def test_it_requires_what_it_reads():
    assert KQuant(bits=2, importance=False).requires == frozenset()
    assert KQuant(bits=2).requires == {Statistic.MEAN_SQUARE}
    assert KQuant(bits=2, feedback=True).requires == {Statistic.HESSIAN}
    assert KQuant(bits=2, feedback=True, importance=False).requires == {Statistic.HESSIAN}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "type or bits must be given"),
        ({"bits": 7}, "bits must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ({"type": "Q9_K"}, "type must be one of Q2_K"),
        ({"type": "Q4_K", "bits": 2}, "bits=2 is Q2_K, but type=Q4_K"),
        ({"bits": 4, "sweeps": 2}, "sweeps=2 need the Hessian"),
        ({"bits": 4, "feedback": True, "sweeps": -1}, "sweeps must be 0 or more"),
        ({"bits": 4, "damping": 0.0}, "damping must be above 0"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        KQuant(**options)
