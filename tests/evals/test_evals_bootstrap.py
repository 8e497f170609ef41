"""Intervals: cases that can be enumerated, agreement with the normal approximation, and determinism."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.evals.bootstrap import Interval, bootstrap, bootstrap_mean, bootstrap_ratio


def test_two_items_give_the_three_means_that_two_draws_can_have():
    # Draws of two from {0, 1}: mean 0 and 1 with chance 1/4 each, above the 2.5 % tails.
    assert bootstrap_mean([0.0, 1.0], seed=0) == Interval(0.5, 0.0, 1.0)
    assert bootstrap_mean([0.0, 1.0], seed=0, confidence=0.4) == Interval(0.5, 0.5, 0.5)


def test_equal_items_leave_no_room():
    interval = bootstrap_mean([0.7] * 9, seed=3)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.7, 0.7, 0.7))


def test_many_items_give_the_normal_interval():
    values = np.arange(400) % 2
    interval = bootstrap_mean(values, seed=1)
    half_width = 1.96 * 0.5 / 400**0.5
    assert interval.value == 0.5
    assert interval.low == pytest.approx(0.5 - half_width, abs=0.004)
    assert interval.high == pytest.approx(0.5 + half_width, abs=0.004)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5)
    assert bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)


def test_blocks_of_resamples_are_all_used(monkeypatch):
    monkeypatch.setattr("fledge.evals.bootstrap._WEIGHTS_AT_ONCE", 64)
    seen = []

    def count(weights_RN):
        seen.append(len(weights_RN))
        assert (weights_RN.sum(axis=1) == 10).all()
        return weights_RN @ np.arange(10.0) / 10

    bootstrap(count, 10, seed=0, num_resamples=1001)
    assert sum(seen) == 1 + 1001


def test_a_ratio_weighs_items_by_their_denominators_and_skips_empty_resamples():
    interval = bootstrap_ratio([1.0, 0.0, 0.0], [1.0, 3.0, 0.0], seed=0)
    assert interval.value == 0.25
    assert (interval.low, interval.high) == (0.0, 1.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.integers(0, 2**31))
def test_an_interval_holds_its_value_and_stays_within_the_data(values, seed):
    interval = bootstrap_mean(values, seed=seed, num_resamples=200)
    assert interval.low <= interval.value <= interval.high
    assert min(values) - 1e-9 <= interval.low
    assert interval.high <= max(values) + 1e-9


def test_metrics_carry_value_and_bounds_under_one_name():
    assert Interval(0.5, 0.4, 0.6).metrics("rate") == {"rate": 0.5, "rate_low": 0.4, "rate_high": 0.6}


def test_nothing_to_resample_is_refused():
    with pytest.raises(ValueError, match="items"):
        bootstrap_mean([], seed=0)
