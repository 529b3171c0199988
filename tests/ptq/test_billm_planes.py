"""Weights in binary planes: bits that are kept to, steps that never lose, codes that come back."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitnet.ptq import LayerStats
from bitnet.ptq.billm import BiLLM, PlaneWeight
from bitnet.ptq.billm.allocation import affordable_planes, planes_per_column
from bitnet.ptq.billm.method import damped
from bitnet.ptq.billm.ours import quantize_to_planes
from bitnet.ptq.billm.planes import DISTORTION, MOST_PLANES, ScaleGrid, levels
from bitnet.ptq.billm.stored import pack_bits, unpack_bits
from bitnet.ptq.hessian import relative_error
from bitnet.quant.packing import pack


def layer(rows: int, columns: int) -> tuple[Tensor, LayerStats]:
    """Normal weights of uneven columns, a zero row, an outlier; inputs of very uneven size, one dead."""
    weight = torch.randn(rows, columns) * torch.linspace(0.5, 2, columns)
    weight[0, 0] = 20.0
    weight[1] = 0.0
    x = torch.randn(4 * columns, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / columns**0.5)
    x *= torch.exp(torch.randn(columns))
    x[:, 3] = 0.0
    return weight, LayerStats(n_tokens=len(x), hessian=x.t() @ x / len(x))


def steps(weight: Tensor, stats: LayerStats, bits: float, sweeps: int) -> tuple[list[tuple[str, Tensor]], PlaneWeight]:
    assert stats.hessian is not None
    order = stats.hessian.diagonal().argsort(descending=True, stable=True)
    factor = stats.inverse_factor(0.01, order)
    hessian = damped(stats.hessian, factor.damping)
    seen: list[tuple[str, Tensor]] = []
    weight = weight.masked_fill(stats.hessian.diagonal() == 0, 0.0)
    watch = lambda name, values: seen.append((name, values.clone()))  # noqa: E731
    result = quantize_to_planes(weight, hessian, factor.upper, order, bits, sweeps, watch)
    target = weight.t()[order].double()
    metric = hessian[order][:, order].double()
    return [(name, ((target - v) * (metric @ (target - v.double()))).sum()) for name, v in seen], result


@pytest.mark.parametrize("bits", [1.1, 2.0, 3.5])
def test_no_step_of_the_refinement_makes_the_error_larger(bits: float) -> None:
    weight, stats = layer(48, 100)
    errors, _ = steps(weight, stats, bits, sweeps=5)
    names, sizes = zip(*errors, strict=True)
    assert names == ("rows", "columns") * 5
    for before, after in itertools.pairwise(sizes):
        assert after <= before * (1 + 1e-6)
    assert sizes[-1] < 0.9 * sizes[0]


def test_what_is_read_back_is_what_the_search_ended_with() -> None:
    weight, stats = layer(48, 100)
    assert stats.hessian is not None
    last: list[Tensor] = []
    order = stats.hessian.diagonal().argsort(descending=True, stable=True)
    factor = stats.inverse_factor(0.01, order)
    result = quantize_to_planes(
        weight, damped(stats.hessian, 0.01), factor.upper, order, 2.5, 3, lambda _, values: last.append(values.clone())
    )
    assert torch.equal(result.dequantize(), last[-1][order.argsort()].t())


@pytest.mark.parametrize("bits", [1.1, 1.5, 2.0, 2.25, 3.0, 4.5])
@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (128, 300), (513, 111)])
def test_the_bits_asked_for_are_kept_to_and_used(bits: float, rows: int, columns: int) -> None:
    weight, stats = layer(rows, columns)
    result = BiLLM(bits=bits, sweeps=0).quantize(weight, stats)
    assert bits - 1.1 / columns - 0.001 <= result.bits_per_weight <= bits


def test_a_matrix_too_small_for_its_scales_gets_signs_and_says_what_they_cost() -> None:
    weight = torch.randn(4, 6)
    result = BiLLM(bits=1.1).quantize(weight, LayerStats(n_tokens=9, hessian=torch.eye(6)))
    assert isinstance(result, PlaneWeight)
    assert int(result.planes_per_column.sum()) == 6
    assert result.bits_per_weight > 5


def test_planes_go_where_the_distortion_falls_most() -> None:
    saliency = torch.tensor([5.0, 0.2, 1.0, 0.0])

    def cost(orders: tuple[int, ...]) -> float:
        return sum(s * DISTORTION[n] for s, n in zip(saliency.tolist(), orders, strict=True))

    for total in range(1, 12):
        everything = itertools.product(range(MOST_PLANES + 1), repeat=4)
        best = min(cost(orders) for orders in everything if sum(orders) == total)
        found = planes_per_column(saliency, total)
        assert int(found.sum()) == total
        assert cost(tuple(found.tolist())) == pytest.approx(best, rel=1e-6)
    assert planes_per_column(saliency, 99).tolist() == [5, 5, 5, 0]  # nothing to gain in the last column


def test_the_overhead_is_that_of_the_stored_tensors() -> None:
    weight, stats = layer(64, 65)
    result = BiLLM(bits=2.0, sweeps=0).quantize(weight, stats)
    assert isinstance(result, PlaneWeight)
    assert int(result.planes_per_column.sum()) == affordable_planes(2.0, 64, 65)


@pytest.mark.parametrize("order", range(1, MOST_PLANES + 1))
def test_the_levels_are_the_best_for_a_normal_distribution(order: int) -> None:
    """Each level is the mean of what is rounded to it, on a fine grid of quantiles; the distortion is as stated."""
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(400_000).double() + 0.5) / 400_000)
    values = levels(order).double()
    nearest = torch.bucketize(quantiles, (values[1:] + values[:-1]) / 2)
    means = torch.zeros(2**order, dtype=torch.float64).index_add_(0, nearest, quantiles) / nearest.bincount()
    torch.testing.assert_close(values, means, atol=5e-4, rtol=0)
    assert float((quantiles - values[nearest]).square().mean()) == pytest.approx(DISTORTION[order], rel=1e-2)


@pytest.mark.parametrize("count", [0, 1, 8, 13, 800])
def test_bits_are_packed_in_the_layout_of_signs(count: int) -> None:
    bits = torch.rand(count) < 0.5
    assert torch.equal(pack_bits(bits), pack(bits.to(torch.int8) * 2 - 1, "b1"))
    assert torch.equal(unpack_bits(pack_bits(bits), count), bits)


@given(st.integers(1, 20), st.lists(st.integers(0, MOST_PLANES), min_size=1, max_size=40), st.integers(0, 999))
def test_codes_orders_and_scales_come_back_from_the_bytes(rows: int, orders: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    per_column = torch.tensor(orders)
    codes = (torch.rand(rows, len(orders), generator=generator) * 2**per_column).to(torch.uint8)
    scale = torch.randint(0, 256, (rows + len(orders),), generator=generator, dtype=torch.uint8)
    grid = torch.tensor([[-3.0, 0.01], [0.5, 0.02]])
    weight = PlaneWeight.from_codes(codes, per_column, scale[:rows], scale[rows:], grid)
    assert torch.equal(weight.codes(), codes)
    assert weight.planes_per_column.tolist() == orders
    assert weight.planes.numel() == -(-rows * sum(orders) // 8)
    row = ScaleGrid.of(*grid[0].tolist()).table[scale[:rows].long()]
    column = ScaleGrid.of(*grid[1].tolist()).table[scale[rows:].long()]
    level = torch.stack([levels(n)[codes[:, j].long()] for j, n in enumerate(orders)], 1)
    assert torch.equal(weight.dequantize(), level * row[:, None] * column)


def test_a_scale_moves_to_the_nearest_of_the_grid_and_nothing_but_zero_to_zero() -> None:
    grid = ScaleGrid.of(-2.0, 0.05)
    assert torch.equal(grid.nearest(grid.table), grid.table)
    assert torch.equal(grid.codes(grid.table), torch.arange(256, dtype=torch.uint8))
    x = torch.rand(1000) * 5
    distances = (x[:, None] - grid.table).abs()
    torch.testing.assert_close((grid.nearest(x) - x).abs(), distances.amin(1))
    assert grid.nearest(torch.tensor([-1.0, 0.0])).tolist() == [0.0, 0.0]


def test_half_the_published_bits_give_less_than_the_published_error() -> None:
    weight, stats = layer(128, 256)
    assert stats.hessian is not None
    ours = BiLLM(bits=1.5).quantize(weight, stats)
    published = BiLLM(variant="official").quantize(weight, stats)
    errors = [relative_error(weight, each.dequantize(), stats.hessian) for each in (ours, published)]
    assert ours.bits_per_weight <= 0.5 * published.bits_per_weight
    assert errors[0] < errors[1]


@pytest.mark.parametrize("options", [{"bits": 3.0}, {"variant": "refined"}], ids=["ours", "refined"])
def test_the_target_moves_towards_the_full_precision_output(options: dict[str, Any]) -> None:
    weight = torch.randn(32, 64)
    x_full = torch.randn(2000, 64) * torch.linspace(0.5, 2, 64)
    x = x_full + 0.3 * torch.randn(2000, 64) @ torch.randn(64, 64) / 8
    stats = LayerStats(n_tokens=2000, hessian=x.t() @ x / 2000, cross=(x - x_full).t() @ x / 2000)
    errors = []
    for correction in (0.0, 1.0):
        values = BiLLM(**options, correction=correction).quantize(weight, stats).dequantize()
        errors.append(float((x_full @ weight.t() - x @ values.t()).square().mean()))
    assert errors[1] < errors[0]


def test_a_dead_input_takes_no_planes() -> None:
    weight, stats = layer(64, 64)
    result = BiLLM(bits=3.0).quantize(weight, stats)
    assert isinstance(result, PlaneWeight)
    assert int(result.planes_per_column[3]) == 0
    assert (result.dequantize()[:, 3] == 0).all()
