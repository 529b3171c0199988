"""Rounding to nearest as a method: options, statistics, and what it refuses."""

import pytest
import torch

from bitnet.errors import InputError
from bitnet.ptq import LayerStats, RoundToNearest, Statistic
from bitnet.quant import absmax, zero_point


def tailed(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[0, 0], weight[-1, -1] = 0.0, 0.4
    weight[rows // 2] = 0.0
    return weight


@pytest.mark.parametrize(("symmetric", "reference"), [(True, absmax), (False, zero_point)])
@pytest.mark.parametrize("granularity", ["tensor", "row", 16])
def test_with_float32_scales_it_is_absmax_or_zero_point_quantization(symmetric, reference, granularity):
    weight = tailed(6, 37)
    method = RoundToNearest(symmetric, bits=3, granularity=granularity, scale_dtype="float32")
    q, expected = method.quantize(weight, None), reference(weight, bits=3, granularity=granularity)
    assert torch.equal(q.qdata, expected.qdata)
    torch.testing.assert_close(q.scale, expected.scale)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 1), (1, 300), (6, 37)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_has_finite_values_near_the_weights(rows, columns, symmetric, dtype):
    weight = tailed(rows, columns).to(dtype)
    q = RoundToNearest(symmetric, bits=8).quantize(weight, None)
    assert q.shape == weight.shape
    assert (q.dequantize() - weight.float()).abs().max() <= 0.4 / 100
    assert torch.equal(q.qdata, RoundToNearest(symmetric, bits=8).quantize(weight.float(), None).qdata)


def test_every_stored_bit_is_counted():
    q = RoundToNearest(symmetric=False, bits=4, granularity=128).quantize(tailed(8, 256), None)
    assert q.bits_per_weight == 4 + (16 + 4) / 128


def test_importance_asks_for_the_mean_square_and_lowers_the_weighted_error():
    weight = tailed(32, 128)
    mean_square = torch.rand(128, generator=torch.Generator().manual_seed(1)) ** 4
    stats = LayerStats(n_tokens=10, mean_square=mean_square)
    plain = RoundToNearest(symmetric=False, bits=2, range="mse")
    weighted = RoundToNearest(symmetric=False, bits=2, range="mse", importance=True)
    assert plain.requires == frozenset()
    assert weighted.requires == {Statistic.MEAN_SQUARE}

    def error(method: RoundToNearest) -> torch.Tensor:
        return ((method.quantize(weight, stats).dequantize() - weight).square() * mean_square).sum()

    assert error(weighted) < 0.97 * error(plain)


def test_it_is_deterministic_and_leaves_the_weight_as_it_was():
    weight, method = tailed(6, 37), RoundToNearest(symmetric=False, bits=2, range="mse")
    before = weight.clone()
    assert torch.equal(method.quantize(weight, None).qdata, method.quantize(weight, None).qdata)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits must be 2 to 8"),
        ({"range": "minmax", "importance": True}, "range=mse"),
        ({"granularity": 0}, "granularity must be"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        RoundToNearest(symmetric=False, **options)


def test_weights_that_have_no_codes_are_refused():
    weight = tailed(4, 8)
    weight[1, 1] = float("nan")
    with pytest.raises(InputError, match="NaN or infinity"):
        RoundToNearest(symmetric=True).quantize(weight, None)
    with pytest.raises(InputError, match="scale_dtype to bfloat16"):
        RoundToNearest(symmetric=True).quantize(tailed(4, 8) * 1e7, None)
