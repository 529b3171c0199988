"""The grid that weights are rounded to: scales as stored, groups, ranges, importance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet.errors import InputError
from bitnet.quant import absmax, absmean_ternary, zero_point
from bitnet.quant.grid import Grid


def tailed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[0, 0], weight[-1, -1] = 0.0, 0.4
    return weight


@pytest.mark.parametrize("granularity", ["tensor", "row", 8, 5])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_full_range_in_float32_is_absmax_or_zero_point(granularity, bits):
    weight = tailed(6, 19)
    for symmetric, reference in ((True, absmax), (False, zero_point)):
        q = Grid(bits, symmetric, granularity, scale_dtype="float32").quantize(weight)
        expected = reference(weight, bits=bits, granularity=granularity)
        assert torch.equal(q.qdata, expected.qdata)
        torch.testing.assert_close(q.scale, expected.scale)


@pytest.mark.parametrize("granularity", ["row", 8, 5])
def test_the_ternary_grid_of_the_mean_magnitude_is_absmean(granularity):
    weight = tailed(6, 19)
    q = Grid(1.58, symmetric=True, granularity=granularity, range="absmean", scale_dtype="float32").quantize(weight)
    expected = absmean_ternary(weight, granularity=granularity)
    assert torch.equal(q.qdata, expected.qdata)
    torch.testing.assert_close(q.scale, expected.scale)


@pytest.mark.parametrize("range", ["minmax", "percentile", "mse"])
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 20),
    granularity=st.sampled_from(["tensor", "row", 8, 5]),
    symmetric=st.booleans(),
)
@settings(max_examples=10)
def test_a_narrow_last_group_is_fitted_to_its_own_columns(range, rows, columns, granularity, symmetric):
    weight = tailed(rows, columns)
    grid = Grid(3, symmetric, granularity, range, percentile=70.0)
    q = grid.quantize(weight)
    if isinstance(granularity, int) and columns % granularity:
        tail = weight[:, columns - columns % granularity :]
        alone = Grid(3, symmetric, "row", range, percentile=70.0).quantize(tail)
        assert torch.equal(q.scale[:, -1:], alone.scale)
        assert torch.equal(q.qdata[:, columns - columns % granularity :], alone.qdata)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_are_those_of_the_scale_as_stored(scale_dtype, symmetric):
    weight = tailed(5, 40)
    q = Grid(4, symmetric, 16, scale_dtype=scale_dtype).quantize(weight)
    assert q.scale.dtype == getattr(torch, scale_dtype)
    steps = weight / q.per_column(q.scale.float())
    zero = 0 if q.zero_point is None else q.per_column(q.zero_point)
    low = -7 if symmetric else -8
    assert torch.equal(q.qdata, (steps.round() + zero).clamp(low, 7).to(torch.int8))


def test_columns_that_matter_more_err_less():
    weight = tailed(16, 64)
    importance = torch.ones(64)
    importance[::4] = 50.0
    plain, weighted = (Grid(2, range="mse", granularity=64).quantize(weight, each) for each in (None, importance))
    error_plain, error_weighted = ((q.dequantize() - weight)[:, ::4].square().sum() for q in (plain, weighted))
    assert error_weighted < 0.95 * error_plain


def test_importance_that_is_equal_everywhere_changes_nothing():
    weight = tailed(4, 50)
    grid = Grid(3, range="mse", granularity=16)
    assert torch.equal(grid.quantize(weight).qdata, grid.quantize(weight, torch.full((50,), 4.0)).qdata)


@pytest.mark.parametrize("range", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("bits", [1.58, 2, 8])
def test_rows_of_zeros_stay_zeros_and_their_neighbours_do_not_notice(range, bits):
    weight = tailed(4, 24)
    weight[2] = 0.0
    grid = Grid(bits, symmetric=bits == 1.58, granularity=8, range=range)
    q = grid.quantize(weight)
    assert (q.scale > 0).all()
    assert (q.dequantize()[2] == 0).all()
    assert torch.equal(q.qdata[3], grid.quantize(weight[3:]).qdata[0])


def test_entropy_clips_the_outlier_of_a_tensor():
    weight = torch.randn(200, 200, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3, 4] = 4.0
    q = Grid(8, symmetric=True, granularity="tensor", range="entropy").quantize(weight)
    assert q.scale.shape == (1, 1)
    assert q.scale.item() < 0.2 * 4.0 / 127


def test_fitting_leaves_the_weight_as_it_was():
    weight = tailed(3, 20)
    before = weight.clone()
    Grid(2, range="mse", granularity=8).quantize(weight, torch.rand(20))
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits must be 2 to 8"),
        ({"bits": 4.5}, "bits must be 2 to 8, or 1.58"),
        ({"bits": 1.58}, "symmetric=true"),
        ({"range": "max"}, "range must be one of"),
        ({"range": "mse", "norm": 0.0}, "norm"),
        ({"range": "percentile", "percentile": 101.0}, "percentile"),
        ({"range": "entropy"}, "granularity=tensor, got 128"),
        ({"range": "absmean"}, "bits=1.58"),
        ({"scale_dtype": "int8"}, "scale_dtype must be one of float16, bfloat16, float32"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Grid(**options)
