"""Win rates: known answers, symmetry, position and length bias, degenerate fits (C57)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import DataError
from fledge.evals import win_rate


def judge_by(table):
    return lambda prompts, answers: [table[answer] for answer in answers]


def test_c57_ties_count_half():
    scores = {"good": 2.0, "bad": 1.0, "same": 1.0}
    metrics = win_rate.evaluate(
        judge_by(scores), range(4), ["good", "bad", "same", "bad"], ["bad", "same", "bad", "good"], seed=0
    )
    assert metrics["win_rate"] == 0.5
    assert (metrics["wins"], metrics["ties"], metrics["losses"]) == (1, 2, 1)
    assert metrics["score_difference"] == 0.0


def test_c57_bounds_are_those_of_a_binomial_share():
    ours, theirs = ["a"] * 400, ["b"] * 400
    outcome = np.arange(400) < 240
    metrics = win_rate.from_preferences(outcome.astype(float), ours, theirs, seed=0)
    half_width = 1.96 * math.sqrt(0.6 * 0.4 / 400)
    assert metrics["win_rate"] == 0.6
    assert metrics["win_rate_low"] == pytest.approx(0.6 - half_width, abs=0.005)
    assert metrics["win_rate_high"] == pytest.approx(0.6 + half_width, abs=0.005)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=30))
def test_swapping_the_sides_mirrors_every_rate(rows):
    ours = ["x" * length for _, _, length in rows]
    theirs = ["y" * 10 for _ in rows]
    preference = np.asarray([(np.sign(a - b) + 1) / 2 for a, b, _ in rows])
    one = win_rate.from_preferences(preference, ours, theirs, seed=1, num_resamples=20)
    other = win_rate.from_preferences(1 - preference, theirs, ours, seed=1, num_resamples=20)
    for name in ("win_rate", "win_rate_length_controlled"):
        assert one[name] == pytest.approx(1 - other[name], abs=1e-6)
        assert 0 <= one[f"{name}_low"] <= one[name] <= one[f"{name}_high"] <= 1


def test_c57_a_judge_of_nothing_but_length_and_noise_gives_half_once_length_is_controlled():
    rng = np.random.default_rng(0)
    ours = ["x" * int(n) for n in rng.integers(20, 60, size=500)]
    theirs = ["x" * int(n) for n in rng.integers(10, 40, size=500)]

    def judge(_, answers):
        return [len(answer) + rng.normal(0, 10) for answer in answers]

    metrics = win_rate.evaluate(judge, range(500), ours, theirs, seed=0)
    assert metrics["win_rate_low"] > 0.7
    assert metrics["win_rate_length_controlled_low"] < 0.5 < metrics["win_rate_length_controlled_high"]
    assert metrics["length_difference"] == pytest.approx(15, abs=2)


def test_controlling_for_length_recovers_the_rate_that_made_the_data():
    rng = np.random.default_rng(1)
    theta, phi = 0.8, 1.5
    difference = rng.normal(20, 40, size=40_000).round()
    length = np.tanh(difference / difference.std())
    outcome = (rng.random(len(length)) < 1 / (1 + np.exp(-theta - phi * length))).astype(float)
    rate = win_rate.length_controlled(outcome, length, np.ones((1, len(length))))[0]
    assert rate == pytest.approx(1 / (1 + math.exp(-theta)), abs=0.01)


def test_the_fit_is_the_minimum_of_its_loss():
    rng = np.random.default_rng(2)
    outcome, length = rng.integers(0, 3, size=30) / 2, rng.uniform(-1, 1, size=30)
    weights = rng.integers(0, 3, size=(1, 30)).astype(float)

    def loss(theta, phi):
        z = theta + phi * length
        nats = np.logaddexp(0, z) - outcome * z
        return float(weights[0] @ nats + phi**2 / (2 * win_rate.LENGTH_PRIOR_STD**2))

    grid = [(loss(t, p), t) for t in np.arange(-2, 2, 0.01) for p in np.arange(-4, 4, 0.02)]
    rate = win_rate.length_controlled(outcome, length, weights)[0]
    assert rate == pytest.approx(1 / (1 + math.exp(-min(grid)[1])), abs=0.005)


@pytest.mark.parametrize(("outcome", "expected"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_unanimous_judgements_need_no_fit(outcome, expected):
    ours, theirs = ["x" * n for n in range(1, 9)], ["y" * 4] * 8
    metrics = win_rate.from_preferences([outcome] * 8, ours, theirs, seed=0)
    names = [f"win_rate_length_controlled{end}" for end in ("", "_low", "_high")]
    assert [metrics[name] for name in names] == pytest.approx([expected] * 3, abs=1e-9)


def test_equal_lengths_leave_the_plain_rate():
    metrics = win_rate.from_preferences([1, 1, 0, 0.5, 1], ["aa"] * 5, ["bb"] * 5, seed=0)
    assert metrics["win_rate_length_controlled"] == pytest.approx(metrics["win_rate"])
    assert metrics["win_rate_length_controlled_low"] == pytest.approx(metrics["win_rate_low"])


@pytest.mark.parametrize("num_prompts", [1, 2, 3])
def test_length_that_tells_the_winner_perfectly_keeps_the_fit_finite(num_prompts):
    ours = ["x" * 50 if n % 2 == 0 else "x" for n in range(2 * num_prompts)]
    preference = [1.0 if n % 2 == 0 else 0.0 for n in range(2 * num_prompts)]
    metrics = win_rate.from_preferences(preference, ours, ["y" * 25] * len(ours), seed=0)
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_judge_that_always_likes_the_first_answer_gives_half_and_is_found_out():
    metrics = win_rate.evaluate_pairwise(lambda p, a, b: [1.0] * len(p), range(50), ["a"] * 50, ["b"] * 50, seed=0)
    assert metrics["win_rate"] == 0.5
    assert metrics["ties"] == 50
    assert metrics["first_position_rate"] == 1.0


def test_c57_both_orders_are_judged_and_the_first_one_is_drawn_per_prompt():
    calls = []

    def judge(prompts, first, second):
        calls.append((list(first), list(second)))
        return [float(a < b) for a, b in zip(first, second, strict=True)]

    ours, theirs = [f"a{n}" for n in range(60)], [f"b{n}" for n in range(60)]
    metrics = win_rate.evaluate_pairwise(judge, range(60), ours, theirs, seed=3)
    assert metrics["win_rate"] == 1.0
    assert metrics["first_position_rate"] == 0.5
    assert calls[0] == calls[1][::-1]
    ours_first = sum(answer in ours for answer in calls[0][0])
    assert 15 < ours_first < 45
    win_rate.evaluate_pairwise(judge, range(60), ours, theirs, seed=3)
    assert calls[2] == calls[0]


def test_a_pairwise_judge_that_scores_like_a_scalar_one_gives_the_same_figures():
    rng = np.random.default_rng(4)
    ours, theirs = (["x" * int(n) for n in rng.integers(1, 30, size=40)] for _ in range(2))

    def value(text):
        return len(text) % 7

    scalar = win_rate.evaluate(lambda _, answers: list(map(value, answers)), range(40), ours, theirs, seed=5)
    pairwise = win_rate.evaluate_pairwise(
        lambda _, a, b: [(np.sign(value(x) - value(y)) + 1) / 2 for x, y in zip(a, b, strict=True)],
        range(40),
        ours,
        theirs,
        seed=5,
    )
    shared = set(scalar) & set(pairwise)
    assert len(shared) == 10
    assert {name: scalar[name] for name in shared} == {name: pairwise[name] for name in shared}


def test_broken_judges_and_uneven_sides_are_refused():
    with pytest.raises(DataError, match="not a number"):
        win_rate.evaluate(lambda p, a: [math.nan] * len(p), range(2), ["a"] * 2, ["b"] * 2, seed=0)
    with pytest.raises(DataError, match="0 to 1"):
        win_rate.evaluate_pairwise(lambda p, a, b: [2.0] * len(p), range(2), ["a"] * 2, ["b"] * 2, seed=0)
    with pytest.raises(ValueError, match="3 prompts"):
        win_rate.evaluate(judge_by({}), range(3), ["a"], ["b"], seed=0)
    with pytest.raises(DataError, match="no prompts"):
        win_rate.evaluate(judge_by({}), [], [], [], seed=0)
