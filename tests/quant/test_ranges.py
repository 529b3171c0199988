"""Which range each rule chooses, against brute force on the definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet.errors import InputError
from bitnet.quant import QTensor
from bitnet.quant.histogram import Histogram
from bitnet.quant.ranges import Codes, Sample, least_divergence, least_error, min_max, percentile, range_rule
from bitnet.quant.rounding import round_to_codes

GRIDS = [
    Codes(16, symmetric=False),
    Codes(4, symmetric=False, scale_dtype=torch.float16),
    Codes(15, symmetric=True, scale_dtype=torch.bfloat16),
    Codes(3, symmetric=True, scale_dtype=torch.float16),
]


def tailed(sets: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sets, n, generator=generator) * 0.02
    x[0, 0] = 0.3
    x[-1] *= 3
    x[-1, -1] = 0.0
    return x


def histogram_of(x: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.update(x)
    return histogram


def deployed(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, codes: Codes) -> torch.Tensor:
    """The values of ``x`` [sets, n] after real quantization to the grid of each set's range."""
    scale, zero = codes.parameters(low, high)
    scale, zero = scale[:, None], None if zero is None else zero[:, None]
    q = round_to_codes(x, scale.float(), None, codes.low, codes.high, zero)
    return QTensor(q, scale, codes.levels, zero).dequantize()


def error(x, low, high, codes, norm, weights=1.0) -> torch.Tensor:
    return ((deployed(x, low, high, codes) - x).abs().double() ** norm * weights).sum(-1)


@pytest.mark.parametrize("codes", GRIDS)
@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_is_no_worse_than_any_share_of_the_full_range_on_the_deployed_grid(codes, norm, weighted):
    x = tailed(6, 70)
    weights = torch.rand(6, 70) if weighted else None
    sample = Sample.of_values(x, importance=weights)
    low, high = least_error(sample, codes, norm=norm)
    found = error(x, low, high, codes, norm, 1.0 if weights is None else weights)
    full_low, full_high = min_max(sample, codes)
    for percent in range(1, 101, 3):
        share = percent / 100
        other = error(x, full_low * share, full_high * share, codes, norm, 1.0 if weights is None else weights)
        assert (found <= other * (1 + 1e-5)).all(), percent


def test_mse_finds_the_best_ternary_scale():
    x = tailed(4, 200)
    low, high = least_error(Sample.of_values(x), Codes(3, symmetric=True))
    for row in range(4):  # the best scale of the k largest magnitudes is their mean; all k are tried
        magnitudes = x[row].abs().sort(descending=True).values.double()
        best = (magnitudes.cumsum(0) ** 2 / torch.arange(1, 201)).max()
        least = (magnitudes**2).sum() - best
        found = error(x[row : row + 1], low[row : row + 1], high[row : row + 1], Codes(3, symmetric=True), 2)
        assert found.item() <= 1.002 * least.item()


def test_mse_keeps_the_full_range_where_it_loses_nothing():
    x = torch.arange(-8, 8).float()[None] / 4
    low, high = least_error(Sample.of_values(x), Codes(16, symmetric=False))
    assert (low.item(), high.item()) == (-2.0, 1.75)


def test_mse_reads_long_and_many_sets_in_pieces_with_the_same_result(monkeypatch):
    x = tailed(7, 90)
    whole = least_error(Sample.of_values(x), GRIDS[0])
    monkeypatch.setattr("bitnet.quant.ranges.CHUNK", 200)
    by_sets = least_error(Sample.of_values(x), GRIDS[0])
    assert torch.equal(whole[0], by_sets[0])
    monkeypatch.setattr("bitnet.quant.ranges.CHUNK", 32)
    by_columns = least_error(Sample.of_values(x), GRIDS[0])
    torch.testing.assert_close(whole[1], by_columns[1], rtol=0.02, atol=0)


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("codes", [GRIDS[0], GRIDS[2]])
def test_a_value_counted_k_times_counts_like_k_values(rule, codes):
    x, counts = tailed(3, 40), torch.randint(1, 5, (3, 40), generator=torch.Generator().manual_seed(1))
    for row in range(3):
        repeated = x[row].repeat_interleave(counts[row])[None]
        low, high = range_rule(rule, percent=95)(
            Sample.of_values(x[row : row + 1], counts[row : row + 1].float()), codes
        )
        expected_low, expected_high = range_rule(rule, percent=95)(Sample.of_values(repeated), codes)
        torch.testing.assert_close(low, expected_low)
        torch.testing.assert_close(high, expected_high)


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("codes", [Codes(255, symmetric=True), Codes(256, symmetric=False)])
def test_a_histogram_gives_the_range_of_its_values_to_a_bin(rule, codes):
    x = tailed(1, 20000)
    histogram = histogram_of(x)
    for exact, binned in zip(
        range_rule(rule)(Sample.of_values(x), codes),
        range_rule(rule)(Sample.of_histogram(histogram), codes),
        strict=True,
    ):
        tolerance = 0.03 * exact.abs().item() if rule == "mse" else histogram.width
        assert abs(exact.item() - binned.item()) <= tolerance


def test_the_range_of_a_histogram_ends_at_the_exact_minimum_and_maximum():
    x = tailed(1, 500)
    for rule in (min_max, lambda sample, codes: percentile(sample, codes, percent=100.0)):
        low, high = rule(Sample.of_histogram(histogram_of(x)), Codes(256, symmetric=False))
        assert low.item() == x.min().item()
        assert high.item() == x.max().item()


@pytest.mark.parametrize(("percent", "rank"), [(100.0, 1000), (99.9, 999), (99.85, 999), (50.0, 500), (0.01, 1)])
def test_a_symmetric_percentile_is_the_smallest_magnitude_that_holds_its_share(percent, rank):
    x = tailed(2, 1000)
    low, high = percentile(Sample.of_values(x), Codes(255, symmetric=True), percent=percent)
    assert torch.equal(high, x.abs().sort(-1).values[:, rank - 1])
    assert torch.equal(low, -high)


def test_an_asymmetric_percentile_leaves_half_of_the_rest_on_either_side():
    x = torch.arange(-500, 500).float()[torch.randperm(1000)][None]
    low, high = percentile(Sample.of_values(x), Codes(256, symmetric=False), percent=99.0)
    assert (low.item(), high.item()) == (-495.0, 494.0)


def test_a_one_sided_percentile_includes_zero():
    x = torch.linspace(3, 5, 100)[None]
    low, high = percentile(Sample.of_values(x), Codes(256, symmetric=False), percent=90.0)
    assert low.item() == 0.0
    assert 4.8 < high.item() < 5.0


def divergence(histogram: Histogram, low: float, high: float, codes: Codes) -> float:
    """KL(P || Q) by the definition, bin by bin."""
    scale, zero = codes.parameters(torch.tensor(low), torch.tensor(high))
    half = histogram.width / 2
    centres, counts = histogram.centres.tolist(), histogram.counts.tolist()
    inside = [i for i, c in enumerate(centres) if c + half > low and c - half < high]
    p = {i: float(counts[i]) for i in inside}
    p[inside[0]] += sum(counts[: inside[0]])
    p[inside[-1]] += sum(counts[inside[-1] + 1 :])
    shift = 0 if zero is None else zero.item()
    code = {i: min(max(round(centres[i] / scale.item()) + shift, codes.low), codes.high) for i in inside}
    q = dict.fromkeys(inside, 0.0)
    for level in set(code.values()):
        own = [i for i in inside if code[i] == level and counts[i]]
        for i in own:
            q[i] = sum(counts[k] for k in own) / len(own)
    even = 1e-4 / len(inside)
    p_total, q_total = sum(p.values()), max(sum(q.values()), 1.0)
    smooth = [((1 - 1e-4) * p[i] / p_total + even, (1 - 1e-4) * q[i] / q_total + even) for i in inside]
    return sum(a * math.log(a / b) for a, b in smooth)


@pytest.mark.parametrize("codes", [Codes(15, symmetric=True), Codes(256, symmetric=False), Codes(4, symmetric=False)])
def test_entropy_is_the_range_of_least_divergence_among_the_bin_edges(codes, monkeypatch):
    monkeypatch.setattr("bitnet.quant.histogram.BINS_PER_SIDE", 128)  # the reference is a Python loop
    x = tailed(1, 900)
    histogram = histogram_of(x)
    low, high = least_divergence(Sample.of_histogram(histogram), codes)
    found = divergence(histogram, low.item(), high.item(), codes)
    minimum, maximum = x.min().item(), x.max().item()
    full = max(-minimum, maximum)
    others = [full, *(i * histogram.width for i in range(codes.levels // 2, math.ceil(full / histogram.width)))]
    for t in others:
        ends = (-t, t) if codes.symmetric else (max(-t, minimum), min(t, maximum))
        assert found <= divergence(histogram, *ends, codes) + 1e-9


def test_entropy_clips_an_outlier():
    x = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(0)), torch.tensor([200.0])])
    low, high = least_divergence(Sample.of_histogram(histogram_of(x)), Codes(255, symmetric=True))
    assert 2 < high.item() < 20
    assert low.item() == -high.item()


def test_entropy_of_values_is_that_of_their_histogram():
    x = tailed(1, 4000)
    assert least_divergence(Sample.of_values(x), GRIDS[0]) == tuple(
        end.reshape(1) for end in least_divergence(Sample.of_histogram(histogram_of(x)), GRIDS[0])
    )


def test_entropy_of_several_sets_is_refused():
    with pytest.raises(InputError, match="granularity to tensor"):
        least_divergence(Sample.of_values(tailed(3, 40)), GRIDS[0])


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse", "entropy", "absmean"])
def test_zeros_and_one_value_have_a_range_with_a_scale(rule):
    codes = Codes(3, symmetric=True)
    for x in (torch.zeros(1, 5), torch.full((1, 1), 0.7), torch.full((1, 1), -2.0)):
        for sample in (Sample.of_values(x), Sample.of_histogram(histogram_of(x))):
            low, high = range_rule(rule)(sample, codes)
            assert low.shape == sample.low.shape
            assert (low <= 0).all()
            assert (high >= 0).all()
            assert (codes.parameters(low, high)[0] > 0).all()


@given(seed=st.integers(0, 99), power=st.integers(-5, 5))
@settings(max_examples=5)
@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse", "absmean"])
def test_scaled_values_have_a_scaled_range(rule, seed, power):
    x, codes = tailed(3, 50, seed), Codes(3, symmetric=True)
    for ends, scaled in zip(
        range_rule(rule)(Sample.of_values(x), codes),
        range_rule(rule)(Sample.of_values(x * 2.0**power), codes),
        strict=True,
    ):
        assert torch.equal(ends * 2.0**power, scaled)


def test_an_empty_histogram_has_no_range():
    with pytest.raises(InputError, match="empty histogram"):
        Sample.of_histogram(Histogram())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "max"}, "range must be one of minmax, percentile, mse, entropy, absmean, got 'max'"),
        ({"name": "percentile", "percent": 0.0}, "percentile must be above 0"),
        ({"name": "mse", "norm": -1.0}, "norm"),
    ],
)
def test_unknown_rules_and_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        range_rule(**options)
