"""Schedules: their ends, their continuity, and knobs that cannot be."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet.errors import InputError
from bitnet.training import constant, cosine, two_stage, wsd

FACTORIES = [constant, cosine, wsd, two_stage]
totals = st.integers(10, 3000)
warmups = st.floats(0, 0.45)


@pytest.mark.parametrize("make", FACTORIES)
@given(total=totals, warmup=warmups)
def test_every_step_has_a_positive_rate_of_at_most_the_configured_one(make, total, warmup):
    schedule = make(warmup=warmup)
    for step in range(total):
        lr, weight_decay = schedule(step, total)
        assert 0 < lr <= 1
        assert weight_decay in (0, 1)


@pytest.mark.parametrize("make", FACTORIES)
@given(total=totals, warmup=warmups)
def test_the_rate_rises_in_warm_up_and_falls_after_it(make, total, warmup):
    schedule, end = make(warmup=warmup), round(warmup * total)
    rates = [schedule(step, total).lr for step in range(total)]
    assert all(a < b for a, b in pairwise(rates[:end]))
    assert all(a >= b for a, b in pairwise(rates[end:]))


@pytest.mark.parametrize("make", [constant, cosine, wsd])
@given(total=st.integers(400, 3000), warmup=st.floats(0.1, 0.45))
def test_one_stage_schedules_never_jump(make, total, warmup):
    schedule = make(warmup=warmup)
    rates = [schedule(step, total).lr for step in range(total)]
    assert max(abs(a - b) for a, b in pairwise(rates)) < 0.03


@given(total=st.integers(400, 3000), second_lr=st.floats(0.1, 1), power=st.floats(0, 3))
def test_two_stages_jump_once_at_half_way_by_the_ratio_of_rates(total, second_lr, power):
    schedule = two_stage(warmup=0.1, second_lr=second_lr, power=power)
    half = round(total / 2)
    before, after = schedule(half - 1, total), schedule(half, total)
    assert after.lr / before.lr == pytest.approx(second_lr, rel=0.03)
    assert (before.weight_decay, after.weight_decay) == (1, 0)


def test_two_stages_meet_the_published_rates_of_the_700m_model():
    """1.5e-3, at half way 8e-4 falling to 5e-4, then to zero."""
    schedule, total = two_stage(warmup=375), 100_000
    rates = [1.5e-3 * schedule(step, total).lr for step in (374, 49_999, 50_000, 99_999)]
    assert rates == pytest.approx([1.5e-3, 7.5e-4, 5e-4, 0], abs=1e-5)


def test_flat_stages_are_two_steps():
    schedule = two_stage(warmup=2, second_lr=0.5, power=0)
    assert [schedule(step, 8).lr for step in range(8)] == [0.5, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]


def test_warm_up_reaches_the_full_rate_at_its_last_step():
    assert [constant(warmup=4)(step, 10).lr for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_cosine_ends_at_its_floor():
    schedule = cosine(warmup=10, final=0.1)
    assert schedule(99, 100).lr == pytest.approx(0.1)
    assert schedule(54, 100).lr == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 44 / 89)))


def test_wsd_is_flat_until_its_decay():
    schedule = wsd(warmup=0, decay=0.2, final=0)
    assert schedule(79, 100).lr == schedule(80, 100).lr == 1
    assert schedule(99, 100).lr == pytest.approx(0.05)


@pytest.mark.parametrize("make", FACTORIES)
def test_a_warm_up_longer_than_the_run_is_refused(make):
    with pytest.raises(InputError, match="warm-up must"):
        make(warmup=375)(0, 300)


def test_a_warm_up_beyond_the_switch_is_refused():
    with pytest.raises(InputError, match="before the second stage begins at step 200"):
        two_stage(warmup=375)(0, 400)


@pytest.mark.parametrize("step", [-1, 100])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(InputError, match="expected a step"):
        constant()(step, 100)


@pytest.mark.parametrize(
    "make",
    [
        lambda: constant(warmup=-1),
        lambda: constant(warmup=2.5),
        lambda: cosine(final=1.5),
        lambda: wsd(decay=-0.1),
        lambda: two_stage(second_lr=7),
        lambda: two_stage(power=-1),
    ],
)
def test_knobs_out_of_range_are_refused(make):
    with pytest.raises(InputError, match="must be"):
        make()
