"""Learned scales: the published formulas, gradients against autograd's own, and what a scale begins with."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet.errors import InputError
from bitnet.quant import LSQ, SEQ, LearnedScale, learned_gradients, pack, unpack
from bitnet.quant.learned import FLOOR

GRANULARITIES = ["tensor", "row", 8, 5]
RULES = [LSQ(2), LSQ(3), LSQ(4), LSQ(8), SEQ(2), SEQ(1.58)]


def with_granularity(rule, granularity, init=None):
    return type(rule)(rule.bits, granularity, init or rule.init)


def tailed(rows, columns, seed, scale=0.02):
    """Normal values with an exact zero and an outlier that is clipped."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    weight[0, 0] = 0.0
    weight[-1, -1] = 20 * scale
    return weight


def per_column(scale, granularity, columns):
    return scale.repeat_interleave(granularity, dim=-1)[:, :columns] if isinstance(granularity, int) else scale


def reference_value(rule, weight, scale, granularity):
    """The papers' formulas in float64, on a grid that autograd sees as the identity."""

    def rounded(x):
        return x + (x.round() - x).detach()

    s = per_column(scale, granularity, weight.shape[1])
    if isinstance(rule, LSQ):
        return rounded((weight / s).clamp(-(2 ** (rule.bits - 1)), 2 ** (rule.bits - 1) - 1)) * s
    k = 4 if rule.bits == 2 else 3  # cells in [-a, a]
    a = s * (4 if k == 4 else 1.5)
    shift = 0.5 if k == 4 else 0.0
    inner = (weight / a).clamp(-1, 1) * (k / 2)
    index = rounded(inner - shift)
    index = index + (index.clamp(-(k // 2), (k - 1) // 2) - index).detach()  # the two ends themselves
    return (index + shift) / k * 2 * a


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@settings(max_examples=12)
@given(rows=st.integers(1, 6), columns=st.integers(1, 21), seed=st.integers(0, 99))
def test_values_are_codes_times_scale_and_equal_the_published_formula(rule, granularity, rows, columns, seed):
    rule = with_granularity(rule, granularity)
    weight = tailed(rows, columns, seed)
    learned = rule.for_weight(weight)
    q = learned(weight)
    groups = -(-columns // granularity) if isinstance(granularity, int) else 1
    assert q.scale.shape == (1 if granularity == "tensor" else rows, groups)
    assert q.qdata.unique().numel() <= q.levels
    expected = reference_value(rule, weight.double(), learned.scale.detach().double(), granularity)
    torch.testing.assert_close(q.dequantize().double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_are_those_that_autograd_gives_the_published_formula(rule, granularity):
    rule = with_granularity(rule, granularity, "absmax")
    weight, grad = tailed(7, 19, 3), torch.randn(7, 19)
    scale = rule.for_weight(weight).scale.detach() * 0.6  # some weights are clipped whatever the rule
    of_weight, of_scale = learned_gradients(rule, weight, rule.quantize(weight, scale), grad)

    w, s = weight.double().requires_grad_(), scale.double().requires_grad_()
    reference_value(rule, w, s, granularity).backward(grad.double())
    top = {2: 1, 3: 3, 4: 7, 8: 127}[rule.bits] if isinstance(rule, LSQ) else {2: 3, 1.58: 1}[rule.bits]
    if isinstance(granularity, int):
        members = torch.tensor([min(granularity, 19 - start) for start in range(0, 19, granularity)])
    else:
        members = torch.tensor(7 * 19 if granularity == "tensor" else 19)
    torch.testing.assert_close(of_weight.double(), w.grad)
    torch.testing.assert_close(of_scale.double(), s.grad / (members * top).double().sqrt(), rtol=1e-5, atol=1e-7)
    assert (of_weight == 0).any()
    assert (of_weight != 0).any()


def test_two_bit_stretched_codes_are_the_odd_numbers_and_borders_go_to_even_cells():
    weight = torch.tensor([[-9.0, -4.0, -2.0, -1.0, 0.0, 0.1, 2.0, 2.1, 4.0]])
    q = SEQ(2).quantize(weight, torch.ones(1, 1))
    assert q.qdata.tolist() == [[-3, -3, -3, -1, 1, 1, 1, 3, 3]]  # cells -2, -1, 0, 1: 0.0 and 2.0 go to cell 0
    assert q.odd
    assert q.levels == 4


def test_ternary_stretched_values_are_two_thirds_of_the_range():
    q = SEQ(1.58).for_weight(torch.tensor([[3.0, -1.0, 1.1, 0.9]]))(torch.tensor([[3.0, -1.0, 1.1, 0.9]]))
    assert q.dequantize().tolist() == [[2.0, 0.0, 2.0, 0.0]]  # cells end at -1 and 1; -0.5 goes to even


def test_lsq_reaches_one_code_more_below_than_above():
    assert LSQ(3).quantize(torch.tensor([[-9.0, 9.0, 0.5, 1.5]]), torch.ones(1, 1)).qdata.tolist() == [[-4, 3, 0, 2]]


def test_four_levels_without_a_zero_cost_two_bits():
    q = SEQ(2, "tensor").for_weight(tailed(8, 64, 0))(tailed(8, 64, 0))
    assert q.bits_per_weight == 2 + 32 / (8 * 64)
    packed = pack(q.qdata, "o2")
    assert packed.shape == (8, 16)
    assert torch.equal(unpack(packed, "o2", 64), q.qdata)


def test_the_published_scales_to_begin_with():
    weight = tailed(4, 16, 1)
    torch.testing.assert_close(LSQ(4).for_weight(weight).scale, 2 * weight.abs().mean(1, True) / math.sqrt(7))
    torch.testing.assert_close(SEQ(2).for_weight(weight).scale * 4, weight.abs().amax(1, True))
    torch.testing.assert_close(SEQ(1.58).for_weight(weight).scale * 1.5, weight.abs().amax(1, True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_searched_scale_errs_no_more_than_any_of_the_shares_it_compares(rule, granularity):
    weight = tailed(3, 19, 5)
    best = with_granularity(rule, granularity, "mse").for_weight(weight)(weight)
    covering = with_granularity(rule, granularity, "absmax")
    scale = covering.for_weight(weight).scale.detach()
    for percent in (100, 83, 50, 12):
        other = covering.quantize(weight, scale * (percent / 100))
        errors = [(q.dequantize() - weight).square().sum() for q in (best, other)]
        assert errors[0] <= errors[1] * (1 + 1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("init", ["mean", "absmax", "mse"])
def test_all_zeros_give_finite_values_and_a_positive_scale(rule, init):
    learned = with_granularity(rule, "row", init).for_weight(torch.zeros(3, 8))
    assert (learned.scale > 0).all()
    assert learned(torch.zeros(3, 8)).dequantize().abs().max() <= 3 * FLOOR


@pytest.mark.parametrize("rule", RULES)
def test_a_scale_that_was_pushed_below_zero_answers_with_the_floor_and_has_a_gradient_to_come_back(rule):
    weight = tailed(2, 8, 0)
    q = rule.quantize(weight, torch.tensor([[-1.0], [0.5]]))
    assert q.scale.tolist() == [[pytest.approx(FLOOR)], [0.5]]
    _, of_scale = learned_gradients(rule, weight, q, -torch.sign(weight))  # larger values would lower the loss
    assert of_scale[0] < 0


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_weights_have_the_codes_of_their_float32_values(rule):
    weight = tailed(4, 12, 2).bfloat16()
    learned, wide = rule.for_weight(weight), rule.for_weight(weight.float())
    assert torch.equal(learned(weight).qdata, wide(weight.float()).qdata)
    assert learned.scale.dtype == torch.float32


def test_a_learned_scale_is_the_one_parameter_of_its_quantizer():
    learned = LSQ(4).for_weight(tailed(4, 8, 0))
    assert isinstance(learned, LearnedScale)
    assert [name for name, _ in learned.named_parameters()] == ["scale"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LSQ(1), "bits must be 2 to 8"),
        (lambda: SEQ(4), "1.58 or 2 bits, got 4: for 3 and 4 take quantizer=lsq"),
        (lambda: SEQ(True), "1.58 or 2 bits"),
        (lambda: LSQ(4, init="median"), "init must be one of mean, absmax, mse, got 'median'"),
        (lambda: SEQ(2, granularity=0), "granularity must be"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options_that_do_not_fit_are_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()
