"""What every quantizer must do, and what each does in particular."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet.errors import InputError
from bitnet.quant import (
    QTensor,
    absmax,
    absmax_b1,
    absmean_int4,
    absmean_ternary,
    centred_sign,
    fake_quantize,
    zero_point,
)

QUANTIZERS = [absmean_ternary, centred_sign, absmean_int4, partial(absmax, bits=4), partial(zero_point, bits=3)]
GRANULARITIES = ["tensor", "row", 8, 5]


def tailed(rows: int, columns: int, seed: int, scale: float = 0.02) -> torch.Tensor:
    """Normal values with an exact zero, an outlier and a tie: what uniform values would hide."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    weight[0, 0] = 0.0
    weight[-1, -1] = 20 * scale
    weight[0, -1] = -weight[0, 0]
    return weight


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 37),
    seed=st.integers(0, 99),
    granularity=st.sampled_from(GRANULARITIES),
)
def test_codes_are_in_range_and_scales_have_the_shape_of_the_granularity(quantizer, rows, columns, seed, granularity):
    q = quantizer(tailed(rows, columns, seed), granularity=granularity)
    groups = -(-columns // granularity) if isinstance(granularity, int) else 1
    assert q.qdata.dtype == torch.int8
    assert q.qdata.unique().numel() <= q.levels
    assert q.scale.shape == (1 if granularity == "tensor" else rows, groups)
    assert q.scale.dtype == torch.float32
    assert (q.scale > 0).all()


@pytest.mark.parametrize("quantizer", [partial(absmax, bits=4), partial(absmax, bits=8), partial(zero_point, bits=3)])
@given(seed=st.integers(0, 99), granularity=st.sampled_from(GRANULARITIES))
def test_rounding_to_a_covering_range_errs_by_half_a_step_at_most(quantizer, seed, granularity):
    weight = tailed(6, 19, seed)
    q = quantizer(weight, granularity=granularity)
    half_step = q.per_column(q.scale) / 2
    assert ((q.dequantize() - weight).abs() <= half_step * (1 + 1e-5)).all()


@pytest.mark.parametrize("quantizer", [absmean_ternary, absmean_int4, centred_sign, absmax, absmax_b1, zero_point])
@given(seed=st.integers(0, 99), power=st.integers(-6, 6))
def test_a_scaled_weight_has_the_same_codes_and_a_scaled_scale(quantizer, seed, power):
    weight = tailed(5, 16, seed)
    q, scaled = quantizer(weight, eps=1e-12), quantizer(weight * 2.0**power, eps=1e-12)
    assert torch.equal(q.qdata, scaled.qdata)
    assert torch.equal(q.scale * 2.0**power, scaled.scale)


@pytest.mark.parametrize("quantizer", [absmean_ternary, absmean_int4, centred_sign, absmax, absmax_b1, zero_point])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_all_zeros_give_finite_values_and_a_positive_scale(quantizer, granularity):
    q = quantizer(torch.zeros(3, 16), granularity=granularity)
    assert (q.scale > 0).all()
    assert q.dequantize().abs().max() <= 1e-5  # signs have no zero: their step is the clamped statistic


@pytest.mark.parametrize("quantizer", [absmean_ternary, absmean_int4, centred_sign, absmax, zero_point])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_not_lost(quantizer, bad):
    weight = tailed(4, 8, 0)
    weight[1, 2] = bad
    assert not torch.isfinite(quantizer(weight, granularity="tensor").dequantize()).any()


@pytest.mark.parametrize("quantizer", [absmean_ternary, absmean_int4, centred_sign, absmax, zero_point])
def test_a_quantizer_leaves_its_argument_as_it_was(quantizer):
    weight = tailed(4, 8, 0)
    before = weight.clone()
    quantizer(weight)
    assert torch.equal(weight, before)


def test_absmean_ternary_is_the_published_formula():
    weight = tailed(64, 48, 1).double()
    unit = weight.abs().mean()
    q = absmean_ternary(weight.float())
    assert torch.equal(q.qdata.double(), (weight / unit).round().clamp(-1, 1))
    assert q.scale.item() == pytest.approx(unit.item(), rel=1e-7)


def test_absmean_per_row_and_group_equals_absmean_of_each_piece():
    weight = tailed(4, 19, 2)
    by_row, by_group = absmean_ternary(weight, granularity="row"), absmean_ternary(weight, granularity=8)
    for row in range(4):
        assert torch.equal(by_row.qdata[row], absmean_ternary(weight[row : row + 1]).qdata[0])
        for group, columns in enumerate((slice(0, 8), slice(8, 16), slice(16, 19))):
            piece = absmean_ternary(weight[row : row + 1, columns])
            assert torch.equal(by_group.qdata[row, columns], piece.qdata[0])
            assert by_group.scale[row, group] == piece.scale


def test_centred_sign_is_the_published_formula_with_zero_counted_as_minus_one():
    weight = torch.tensor([[1.0, -1.0, 3.0, 1.0]])  # the mean is 1: two weights lie on it
    q = centred_sign(weight)
    assert q.qdata.tolist() == [[-1, -1, 1, -1]]
    assert q.scale.item() == 1.5


def test_absmax_rounds_ties_to_even_and_reaches_both_ends():
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5]])
    assert absmax(x).qdata.tolist() == [[127, -127, 0, 2, 2, 0]]


def test_absmax_has_one_scale_a_token():
    x = torch.randn(2, 3, 8) * torch.tensor([1.0, 10.0, 100.0])[:, None]
    q = absmax(x)
    assert q.scale.shape == (2, 3, 1)
    torch.testing.assert_close(q.scale[..., 0], x.abs().amax(-1) / 127)


def test_four_bit_activations_are_the_published_formula_with_seven_codes_above_zero_and_eight_below():
    x = tailed(6, 40, 4).double()
    x[2, 3] = -0.4  # an outlier on the negative side
    mean = x.abs().mean(-1, keepdim=True)
    q = absmean_int4(x.float())
    assert torch.equal(q.qdata.double(), (x * 7**0.5 / mean).round().clamp(-8, 7))
    assert (q.qdata.min(), q.qdata.max()) == (-8, 7)
    torch.testing.assert_close(q.scale.double(), mean / 7**0.5)


def test_small_inputs_keep_their_codes_because_the_statistic_is_clamped_not_the_scale():
    tiny = torch.tensor([[2e-5, -1e-5]])
    assert absmax(tiny).qdata.tolist() == [[127, -64]]


def test_b1_activations_clip_the_maximum_to_code_127_on_either_side():
    assert absmax_b1(torch.tensor([[1.0, -1.0, 0.5]])).qdata.tolist() == [[127, -127, 64]]


def test_zero_point_gives_zero_a_code_of_its_own():
    x = torch.tensor([[0.0, 1.0, 7.5]])
    q = zero_point(x, bits=4)
    assert q.zero_point is not None
    assert q.dequantize()[0, 0] == 0.0
    torch.testing.assert_close(q.dequantize(), x, atol=0.25, rtol=0)


def test_zero_point_uses_every_level_of_a_one_sided_range():
    q = zero_point(torch.linspace(0, 15, 16)[None], bits=4)
    assert q.qdata.tolist() == [list(range(-8, 8))]


@pytest.mark.parametrize("bits", [1, 9, 0])
@pytest.mark.parametrize("quantizer", [absmax, zero_point])
def test_bits_outside_2_to_8_are_refused(quantizer, bits):
    with pytest.raises(InputError, match=f"bits must be 2 to 8, got {bits}"):
        quantizer(torch.randn(2, 4), bits=bits)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("granularity", ["rows", 0, -4, True, 1.5])
def test_an_unknown_granularity_is_refused(granularity):
    with pytest.raises(InputError, match="granularity must be"):
        absmean_ternary(torch.randn(2, 4), granularity=granularity)


@pytest.mark.parametrize("quantizer", [absmean_ternary, absmean_int4, centred_sign, absmax, zero_point])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantize_has_the_value_of_the_codes_and_the_gradient_of_the_input(quantizer, dtype):
    x = tailed(5, 12, 3).to(dtype).requires_grad_()
    y = fake_quantize(x, quantizer)
    assert torch.equal(y, quantizer(x.detach()).dequantize(dtype))
    gradient = torch.randn(5, 12).to(dtype)
    y.backward(gradient)
    assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize(
    ("levels", "columns", "granularity_scales", "bits"),
    [
        (3, 10, 1, (2 * 2 * 8 + 32) / 20),  # two rows of ceil(10 / 5) bytes, one scale
        (3, 11, 2, (2 * 3 * 8 + 64) / 22),  # an eleventh column takes a byte
        (2, 9, 1, (2 * 2 * 8 + 32) / 18),
        (16, 3, 1, (2 * 2 * 8 + 32) / 6),  # 12 bits a row are two bytes
    ],
)
def test_bits_per_weight_counts_the_last_byte_and_every_scale(levels, columns, granularity_scales, bits):
    q = QTensor(torch.zeros(2, columns, dtype=torch.int8), torch.ones(granularity_scales, 1), levels)
    assert q.bits_per_weight == bits


def test_bits_per_weight_counts_zero_points():
    without = absmax(torch.randn(4, 16), bits=4)
    with_zero = QTensor(without.qdata, without.scale, 16, torch.zeros(4, 1, dtype=torch.int8))
    assert with_zero.bits_per_weight - without.bits_per_weight == 4 * 8 / 64
