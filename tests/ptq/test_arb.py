"""ARB-LLM RC: refits that never lose, groups as they are stored, and every byte counted."""

import itertools
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq import ARBLLM, BiLLM, LayerStats, PTQMethod, Statistic
from bitnet.ptq.arb import RECIPE, RULE, alternate, binarize, fit_columns, fit_rows, fit_signs
from bitnet.ptq.billm.published import compensation, salient_columns, split_rest
from bitnet.ptq.hessian import relative_error


def layer(rows: int, columns: int) -> tuple[Tensor, LayerStats]:
    """Normal weights of uneven columns, one outlier, a zero row; correlated inputs, one of them dead."""
    weight = torch.randn(rows, columns) * torch.linspace(0.5, 2, columns)
    weight[rows // 2, columns // 3] = 15.0
    if rows > 2:
        weight[1] = 0.0
    x = torch.randn(500, columns) @ (torch.eye(columns) + 0.5 * torch.randn(columns, columns) / columns**0.5)
    x *= torch.linspace(0.3, 3, columns).flip(0)
    if columns > 3:
        x[:, 2] = 0.0
    return weight, LayerStats(n_tokens=500, hessian=x.t() @ x / 500)


def row_column(t: Tensor, mask: Tensor, order: int, rounds: int) -> Tensor:
    """ARB-RC of one group, as the paper writes it: scales by least squares, signs by trying all combinations."""
    t, terms = (t * mask).double(), []
    rest = t.clone()
    for _ in range(order):
        sign = torch.where(rest >= 0, 1.0, -1.0).double() * mask
        row = rest.abs().sum(1) / mask.sum(1).clamp(min=1)
        column = ((row[:, None] * sign) * rest).sum(0) / ((row[:, None] * sign) ** 2).sum(0).clamp(min=1e-20)
        terms.append([row, column, sign])
        rest = rest - row[:, None] * column * sign
    for _ in range(rounds):
        for k in range(order):
            others = sum((r[:, None] * c * s for i, (r, c, s) in enumerate(terms) if i != k), torch.zeros_like(t))
            term = terms[k]
            base = term[1] * term[2]
            term[0] = ((base * (t - others)).sum(1) / (base**2).sum(1).clamp(min=1e-20)).clamp(min=0)
            base = term[0][:, None] * term[2]
            term[1] = ((base * (t - others)).sum(0) / (base**2).sum(0).clamp(min=1e-20)).clamp(min=0)
        choices = list(itertools.product([1.0, -1.0], repeat=order))
        sizes = [r[:, None] * c for r, c, _ in terms]
        values = torch.stack([sum(s * a for s, a in zip(signs, sizes, strict=True)) for signs in choices])  # type: ignore[arg-type]
        best = (values - t).abs().argmin(0)
        for k in range(order):
            terms[k][2] = torch.tensor([signs[k] for signs in choices]).double()[best] * mask
    return sum((r[:, None] * c * s for r, c, s in terms), torch.zeros_like(t)).float()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rounds", [0, 1, 8])
def test_a_group_is_fitted_as_the_paper_has_it(order: int, rounds: int) -> None:
    t = torch.randn(40, 30) * torch.linspace(0.5, 2, 30)
    t[4], group = 0.0, torch.rand(40, 30) < 0.4
    members = torch.stack([~group, group])
    found = sum((term.values(members) for term in alternate(t, group, order, rounds)), torch.zeros_like(t))
    expected = row_column(t, ~group, order, rounds) + row_column(t, group, order, rounds)
    same = (found - expected).abs() < 2e-2 * t.abs().mean()
    assert same.float().mean() > 0.97  # scales are float16 here: now and then a weight between two values moves
    torch.testing.assert_close((t - found).square().sum(), (t - expected).square().sum(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_no_step_of_the_refits_makes_the_error_larger(order: int) -> None:
    t = torch.randn(40, 60) ** 3
    t[3] = 0.0
    t[5, 5] = 1000.0
    group = torch.rand(40, 60) < 0.4
    members = torch.stack([~group, group])
    terms = alternate(t, group, order, 0)

    def left() -> Tensor:
        return t - sum((term.values(members) for term in terms), torch.zeros_like(t))

    first = before = float(left().square().sum(dtype=torch.float64))
    for _ in range(5):
        for k in range(order):
            for step in (fit_rows, fit_columns):
                terms[k] = step(left() + terms[k].values(members), terms[k], members)
                after = float(left().square().sum(dtype=torch.float64))
                assert after <= before * (1 + 1e-6)
                before = after
        terms = fit_signs(t, terms, members)
        after = float(left().square().sum(dtype=torch.float64))
        assert after <= before * (1 + 1e-6)
        before = after
    assert before < 0.99 * first


def test_the_signs_of_two_terms_are_the_nearest_of_four_values() -> None:
    t, group = torch.randn(20, 30), torch.rand(20, 30) < 0.5
    members = torch.stack([~group, group])
    terms = alternate(t, group, 2, 1)
    terms[1] = replace(terms[1], row=terms[1].row * torch.rand(2, 20, 1) * 4)  # now either term may be the larger
    one, two = ((term.row * term.column * members).sum(0) for term in terms)
    nearest = torch.stack([(t - a * one - b * two).abs() for a in (1, -1) for b in (1, -1)]).amin(0)
    found = sum((term.values(members) for term in fit_signs(t, terms, members)), torch.zeros_like(t))
    torch.testing.assert_close((t - found).abs(), nearest)


@pytest.mark.parametrize(("rows", "columns"), [(24, 150), (7, 65)])  # the last block: 22 columns; 1 column
def test_blocks_are_read_back_as_they_were_found(rows: int, columns: int) -> None:
    weight, stats = layer(rows, columns)
    assert stats.hessian is not None
    upper = stats.inverse_factor(0.01).upper
    working, out = weight.masked_fill(stats.hessian.diagonal() == 0, 0.0), torch.zeros_like(weight)
    for begin in range(0, columns, 64):
        end = min(begin + 64, columns)
        out[:, begin:end] = binarize(working[:, begin:end], 15)[-1]
        left = working[:, begin:end] - out[:, begin:end]
        working[:, end:] -= compensation(left, upper[begin:end, begin:end], upper[begin:end, end:], "block")
    assert torch.equal(ARBLLM(block_size=64).quantize(weight, stats).dequantize(), out)


def test_salient_columns_are_split_as_the_others_are() -> None:
    own = torch.randn(32, 64) ** 3
    salient = salient_columns(own, RECIPE, RULE)
    group = binarize(own, 3)[2]
    assert 0 < int(salient.sum()) < 64
    for columns in (salient, ~salient):
        expected = split_rest(own[:, columns], torch.zeros(int(columns.sum()), dtype=torch.bool), RECIPE, RULE)
        assert torch.equal(group[:, columns], expected)
        assert 0 < int(expected.sum()) < expected.numel()


def test_row_and_column_scales_beat_the_means_of_the_published_code() -> None:
    weight, stats = layer(128, 256)
    assert stats.hessian is not None
    errors = [
        relative_error(weight, method.quantize(weight, stats).dequantize(), stats.hessian)
        for method in (ARBLLM(), BiLLM(variant="official"), ARBLLM(rounds=0))
    ]
    assert errors[0] < 0.7 * errors[1]
    assert errors[0] < errors[2]


def test_the_stored_bits_are_those_of_the_table() -> None:
    weight, stats = layer(256, 256)
    result = ARBLLM().quantize(weight, stats)
    share = result.claimed_bits - 1
    column = 32 * (1 + share) / 256
    expected = {"signs": 1, "residual": share, "bitmap": 1, "salient": 1 / 256, "row": 0.75, "column": column}
    assert 0 < share < 0.4
    assert result.parts == pytest.approx(expected, abs=1e-6)
    assert result.bits_per_weight == pytest.approx(sum(expected.values()))


@pytest.mark.parametrize(("rows", "columns"), [(24, 150), (3, 5), (4, 1), (1, 40), (256, 30)])
def test_a_file_has_the_size_that_is_counted_and_gives_the_same_weights(
    rows: int, columns: int, tmp_path: Path
) -> None:
    weight, stats = layer(rows, columns)
    assert stats.hessian is not None
    result = ARBLLM(block_size=64).quantize(weight, stats)
    assert relative_error(weight, result.dequantize(), stats.hessian) < 1
    tensors = {f.name: getattr(result, f.name) for f in fields(result)}
    plain = {name: value for name, value in tensors.items() if not isinstance(value, Tensor)}
    tensors = {name: value.contiguous() for name, value in tensors.items() if isinstance(value, Tensor)}
    save_file(tensors, tmp_path / "w.safetensors")
    written = (tmp_path / "w.safetensors").read_bytes()
    header = 8 + int.from_bytes(written[:8], "little")
    assert (len(written) - header) * 8 == round(result.bits_per_weight * rows * columns)
    again = type(result)(**load_file(tmp_path / "w.safetensors"), **plain)
    assert torch.equal(again.dequantize(), result.dequantize())


def test_zero_rows_stay_zero() -> None:
    weight, stats = layer(16, 40)
    assert (ARBLLM(block_size=16).quantize(weight, stats).dequantize()[1] == 0).all()
    assert (ARBLLM().quantize(torch.zeros(6, 20), layer(6, 20)[1]).dequantize() == 0).all()


def test_it_asks_for_the_hessian_and_claims_one_bit() -> None:
    method: PTQMethod = ARBLLM()
    assert method.requires == {Statistic.HESSIAN}
    assert method.claimed_bits == 1.0


def test_weights_that_cannot_be_stored_are_refused() -> None:
    weight, stats = layer(16, 40)
    with pytest.raises(InputError, match=r"too large for scales in torch.float16"):
        ARBLLM().quantize(weight * 1e6, stats)
    weight[3, 4] = torch.nan
    with pytest.raises(InputError, match="the weight holds NaN or infinity"):
        ARBLLM().quantize(weight, stats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be 1 or more"),
        ({"rounds": -1}, "rounds 0 or more"),
        ({"damping": 2}, "damping must be above 0"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ARBLLM(**options)
