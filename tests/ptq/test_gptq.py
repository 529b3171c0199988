import pytest
import torch
from torch import Tensor

from bitnet.errors import InputError
from bitnet.ptq import GPTQ, LayerStats
from bitnet.ptq.gptq import column_order, corrected_target
from bitnet.ptq.hessian import relative_error
from bitnet.quant.grid import Grid


def inputs(columns: int, tokens: int = 600, dead: int | None = None) -> Tensor:
    """Correlated inputs of very different sizes, as in a language model."""
    mixing = torch.randn(columns, columns, dtype=torch.float64) / columns**0.5 + torch.eye(columns, dtype=torch.float64)
    x = torch.randn(tokens, columns, dtype=torch.float64) @ mixing * torch.rand(columns, dtype=torch.float64).exp()
    if dead is not None:
        x[:, dead] = 0
    return x


def stats_of(x: Tensor, dtype: torch.dtype = torch.float64) -> LayerStats:
    return LayerStats(n_tokens=len(x), hessian=(x.T @ x / len(x)).to(dtype))


def damped(hessian: Tensor) -> Tensor:
    """With the default damping."""
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def textbook(weight: Tensor, hessian: Tensor, grid: Grid, order: Tensor, *, dynamic: bool) -> Tensor:
    """GPTQ as its paper prints it: one column, then the whole rest of the matrix, in float64. Returns codes."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    inverse = torch.linalg.inv(hessian[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    size = grid.granularity if isinstance(grid.granularity, int) else weight.shape[1]
    scale, zero = grid.fit(weight.float(), hessian.diagonal().float())
    scale = scale.expand(len(weight), -1)
    zero = torch.zeros_like(scale) if zero is None else zero.expand(len(weight), -1)
    work, codes = weight[:, order], torch.zeros(weight.shape, dtype=torch.int8)
    for place, column in enumerate(order.tolist()):
        group = column // size
        if dynamic and place % size == 0:
            fitted, shift = grid.fit(work[:, place : place + size].float())
            scale[:, group], zero[:, group] = fitted[:, 0], 0 if shift is None else shift[:, 0]
        s, z = scale[:, group].double(), zero[:, group].double()
        code = ((work[:, place] / s).round() + z).clamp(grid.low, grid.high)
        codes[:, column] = code.to(torch.int8)
        error = (work[:, place] - (code - z) * s) / upper[place, place]
        work[:, place + 1 :] -= torch.outer(error, upper[place, place + 1 :])
    return codes


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({"order": "none", "granularity": 32}, 96),
        ({"order": "none", "granularity": 32, "groups": "dynamic"}, 96),
        ({"order": "none", "granularity": 48, "groups": "dynamic", "bits": 3}, 150),
        ({"order": "none", "granularity": 7, "groups": "dynamic"}, 61),
        ({"order": "none", "granularity": 160, "groups": "dynamic", "bits": 3}, 350),
        ({"order": "none", "granularity": 97, "groups": "dynamic", "bits": 3}, 200),
        ({"order": "none", "granularity": 256, "groups": "dynamic", "bits": 3}, 300),
        ({"order": "activation", "granularity": 32}, 150),
        ({"order": "activation", "granularity": "row", "bits": 8}, 60),
        ({"order": "activation", "granularity": "tensor", "bits": 5, "symmetric": True}, 60),
        ({"order": "activation", "granularity": 40, "bits": 2, "symmetric": True}, 140),
        ({"order": "grouped", "granularity": 32}, 150),
        ({"order": "grouped", "granularity": 32, "groups": "dynamic", "bits": 3}, 150),
        ({"order": "activation", "granularity": "row", "bits": 1.58, "symmetric": True, "range": "absmean"}, 100),
    ],
)
def test_codes_equal_those_of_the_textbook_loop(options, columns):
    x = inputs(columns, dead=5)
    weight = torch.randn(24, columns, dtype=torch.float64) * 0.02
    method = GPTQ(**options)
    stats = stats_of(x)
    quantized = method.quantize(weight, stats)
    grid = Grid(method.bits, method.symmetric, method.granularity, method.range, method.scale_dtype)
    size = method.granularity if isinstance(method.granularity, int) else None
    order = column_order(stats.hessian.diagonal(), method.order, size)
    expected = textbook(
        weight,
        stats.hessian,
        grid,
        torch.arange(columns) if order is None else order,
        dynamic=method.groups == "dynamic",
    )
    assert torch.equal(quantized.qdata, expected)


def test_float32_gives_the_codes_of_float64_but_for_near_ties():
    x = inputs(256)
    weight = torch.randn(64, 256, dtype=torch.float64) * 0.02
    exact = GPTQ(bits=4).quantize(weight, stats_of(x))
    single = GPTQ(bits=4).quantize(weight.float(), stats_of(x, torch.float32))
    assert (exact.qdata != single.qdata).float().mean() < 0.01


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["none", "activation", "grouped"])
def test_it_is_closer_than_rounding_to_nearest(bits, order):
    x, weight = inputs(200), torch.randn(40, 200) * 0.02
    stats = stats_of(x, torch.float32)
    nearest = Grid(bits).quantize(weight).dequantize()
    quantized = GPTQ(bits=bits, order=order).quantize(weight, stats).dequantize()
    assert relative_error(weight, quantized, stats.hessian) < 0.8 * relative_error(weight, nearest, stats.hessian)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True},
        {"granularity": "row"},
        {"granularity": 48, "range": "mse"},
        {"bits": 1.58, "symmetric": True, "range": "mse"},
        {"granularity": "tensor"},
    ],
)
def test_no_sweep_makes_the_error_larger(options):
    x, weight = inputs(150, dead=3), torch.randn(32, 150, dtype=torch.float64) * 0.02
    stats = stats_of(x)
    results = [GPTQ(**({"bits": 2} | options), sweeps=n).quantize(weight, stats).dequantize() for n in range(4)]
    errors = [relative_error(weight, each, damped(stats.hessian)) for each in results]
    assert errors[1] < errors[0]
    assert errors == sorted(errors, reverse=True)


def test_a_sweep_ends_where_no_single_code_can_be_better():
    x, weight = inputs(40), torch.randn(6, 40) * 0.02
    stats = stats_of(x, torch.float32)
    quantized = GPTQ(bits=3, granularity="row", sweeps=40).quantize(weight, stats)
    best = relative_error(weight, quantized.dequantize(), damped(stats.hessian))
    for row in range(6):
        for column in range(40):
            for step in (-1, 1):
                values = quantized.dequantize()
                code = int(quantized.qdata[row, column]) + step
                if -4 <= code <= 3:
                    values[row, column] += step * quantized.scale[row, 0].float()
                    assert relative_error(weight, values, damped(stats.hessian)) > best - 1e-6


def test_an_input_that_is_never_active_gets_the_value_zero():
    x, weight = inputs(64, dead=9), torch.randn(8, 64)
    values = GPTQ(sweeps=1).quantize(weight, stats_of(x, torch.float32)).dequantize()
    assert (values[:, 9] == 0).all()
    assert (values[:, 8] != 0).any()


@pytest.mark.parametrize("weight", [torch.zeros(5, 70), torch.randn(1, 1), torch.randn(3, 1), torch.randn(1, 130)])
def test_zeros_single_rows_and_single_columns_work(weight):
    x = inputs(weight.shape[1])
    quantized = GPTQ(sweeps=1).quantize(weight, stats_of(x, torch.float32))
    assert quantized.shape == weight.shape
    assert torch.isfinite(quantized.dequantize()).all()
    if not weight.any():
        assert not quantized.dequantize().any()


def test_bfloat16_weights_get_the_codes_of_their_float32_values():
    x, weight = inputs(64), (torch.randn(8, 64) * 0.02).bfloat16()
    one = GPTQ().quantize(weight, stats_of(x, torch.float32))
    other = GPTQ().quantize(weight.float(), stats_of(x, torch.float32))
    assert torch.equal(one.qdata, other.qdata)


def test_arguments_are_not_changed():
    x, weight = inputs(64), torch.randn(8, 64)
    stats = stats_of(x, torch.float32)
    stats.cross = torch.randn(64, 64)
    before = weight.clone(), stats.hessian.clone(), stats.cross.clone()
    GPTQ(correction=0.5, sweeps=1).quantize(weight, stats)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, stats.hessian, stats.cross), strict=True))


def test_the_corrected_target_reaches_the_full_precision_output_best():
    """Least squares of W x_fp on x, solved by another route."""
    true, seen = inputs(30, 900), None
    seen = true + 0.3 * torch.randn_like(true)
    weight = torch.randn(7, 30, dtype=torch.float64)
    stats = stats_of(seen)
    cross = (seen - true).T @ seen / len(seen)
    upper = torch.linalg.inv(torch.linalg.cholesky(stats.hessian.flip(0, 1)).flip(0, 1))
    moved = corrected_target(weight, cross, upper, None, 1.0)
    expected = torch.linalg.lstsq(seen, true @ weight.T).solution.T
    assert torch.allclose(moved, expected, atol=1e-9)
    order = torch.randperm(30)
    permuted = torch.linalg.inv(torch.linalg.cholesky(stats.hessian[order][:, order].flip(0, 1)).flip(0, 1))
    assert torch.allclose(corrected_target(weight, cross, permuted, order, 1.0), expected, atol=1e-9)
    assert torch.equal(corrected_target(weight, cross, upper, None, 0.0), weight)


def test_every_stored_bit_is_counted():
    quantized = GPTQ(bits=4, granularity=32).quantize(torch.randn(8, 64), stats_of(inputs(64), torch.float32))
    assert quantized.bits_per_weight == 4 + (16 + 4) / 32
    symmetric = GPTQ(bits=4, granularity=32, symmetric=True, scale_dtype="float32")
    quantized = symmetric.quantize(torch.randn(8, 64), stats_of(inputs(64), torch.float32))
    assert quantized.bits_per_weight == 4 + 32 / 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits must be 2 to 8"),
        ({"bits": 9}, "bits must be 2 to 8"),
        ({"bits": 2.5}, "bits must be 2 to 8"),
        ({"bits": 1.58}, "symmetric=true"),
        ({"granularity": 0}, "granularity must be"),
        ({"order": "desc"}, "order must be one of"),
        ({"groups": "both"}, "groups must be one of"),
        ({"groups": "dynamic"}, "index for each column"),
        ({"groups": "dynamic", "order": "none", "granularity": "row"}, "has none"),
        ({"damping": 0}, "damping must be"),
        ({"correction": 1.5}, "correction must be"),
        ({"sweeps": -1}, "sweeps must be"),
        ({"range": "median"}, "range must be one of"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        GPTQ(**options)
