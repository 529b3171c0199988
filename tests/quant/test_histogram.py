"""What a histogram counts, whatever the order in which it sees the values."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet.errors import InputError
from bitnet.quant.histogram import BINS_PER_SIDE, Histogram


def seen(*parts: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.update(part)
    return histogram


def same(one: Histogram, other: Histogram) -> bool:
    ends = (one.exponent, one.minimum, one.maximum) == (other.exponent, other.minimum, other.maximum)
    return ends and torch.equal(one.counts, other.counts)


def values_of_all_sizes(seed: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 2.0 ** torch.randint(-12, 9, (n,), generator=generator)
    x[::17] = 0.0
    x[5::29] = 2.0 ** torch.randint(-4, 4, (len(x[5::29]),), generator=generator)  # on an edge
    return x


@given(seed=st.integers(0, 999), cuts=st.lists(st.integers(0, 300), max_size=4))
def test_the_order_of_the_data_and_of_the_merges_changes_no_count(seed, cuts):
    x = values_of_all_sizes(seed, 300)
    ends = [0, *sorted(cuts), 300]
    parts = [x[start:stop] for start, stop in pairwise(ends)]
    whole = seen(x)
    assert same(seen(*parts), whole)
    assert same(seen(*reversed(parts)), whole)
    from_left, from_right = Histogram(), Histogram()
    for part in parts:
        from_left = from_left.merge(seen(part))
    for part in reversed(parts):
        from_right = seen(part).merge(from_right)
    assert same(from_left, whole)
    assert same(from_right, whole)


def test_every_value_is_in_the_bin_that_its_definition_names():
    x = values_of_all_sizes(3, 400)
    histogram = seen(x[:100], x[100:])
    top = 2.0 ** (math.floor(math.log2(float(x.abs().max()))) + 1)
    assert histogram.width == top / BINS_PER_SIDE
    expected = torch.zeros(2 * BINS_PER_SIDE, dtype=torch.int64)
    for value in x.tolist():
        inside = math.floor(abs(value) / histogram.width)
        expected[BINS_PER_SIDE + inside if value >= 0 else BINS_PER_SIDE - 1 - inside] += 1
    assert torch.equal(histogram.counts, expected)


def test_a_centre_is_within_half_a_bin_of_its_values():
    x = values_of_all_sizes(4, 1)
    histogram = seen(x)
    centre = histogram.centres[histogram.counts.bool()]
    assert (centre - x.double()).abs().item() <= histogram.width / 2


def test_minimum_maximum_and_count_are_exact():
    x = values_of_all_sizes(5, 300)
    histogram = seen(x[:7], x[7:])
    assert histogram.minimum == x.min().item()
    assert histogram.maximum == x.max().item()
    assert histogram.count == 300


def test_the_range_holds_a_maximum_that_is_a_power_of_two():
    histogram = seen(torch.tensor([1.0, -1.0]))
    assert histogram.exponent == 1
    assert histogram.counts[BINS_PER_SIDE + BINS_PER_SIDE // 2] == 1
    assert histogram.counts[BINS_PER_SIDE // 2 - 1] == 1


@pytest.mark.parametrize("extreme", [torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny / 4, 0.0])
def test_the_largest_and_the_smallest_floats_are_counted(extreme):
    histogram = seen(torch.tensor([extreme, -extreme, 1e-30]))
    assert histogram.count == 3
    assert histogram.counts[:BINS_PER_SIDE].sum() == (1 if extreme else 0)
    assert same(histogram, seen(torch.tensor([1e-30]), torch.tensor([-extreme]), torch.tensor([extreme])))


def test_merging_leaves_both_as_they_were():
    small, large = seen(torch.tensor([0.1])), seen(torch.tensor([100.0]))
    small.merge(large)
    assert same(small, seen(torch.tensor([0.1])))
    assert same(large, seen(torch.tensor([100.0])))


def test_an_empty_histogram_is_neutral():
    x = torch.tensor([3.0, -2.0])
    assert same(Histogram().merge(seen(x)), seen(x))
    assert same(seen(x, torch.empty(0)), seen(x))


@pytest.mark.parametrize(("bad", "message"), [(math.nan, "NaN 1 times"), (-math.inf, "infinity 1 times")])
def test_a_value_that_is_not_finite_is_refused_by_name_and_nothing_is_counted(bad, message):
    histogram = seen(torch.ones(3))
    with pytest.raises(InputError, match=message):
        histogram.update(torch.tensor([1.0, bad, 5.0]))
    assert same(histogram, seen(torch.ones(3)))


def test_16_bit_values_are_counted_as_their_float32_values():
    x = torch.randn(50).bfloat16()
    assert same(seen(x), seen(x.float()))
