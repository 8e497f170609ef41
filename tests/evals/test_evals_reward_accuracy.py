"""Reward accuracy: rankings whose pairs can be counted by hand (C18)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fledge.errors import DataError
from fledge.evals import reward_accuracy
from fledge.evals.reward_accuracy import calibration_error
from fledge.types import Conversation, Provenance, Ranking


def ranking(completions, ranks, makers, source="chat"):
    return Ranking(
        Conversation.of(("user", "hello")),
        tuple(completions),
        tuple(ranks),
        (True,) * len(ranks),
        tuple(makers),
        Provenance(source, "0", "MIT"),
    )


def scoring(*rows):
    return lambda rankings: rows[: len(rankings)]


THREE = ranking(["a" * 10, "b" * 20, "c" * 10], [1, 2, 3], ["human", "sft", "base"])


def test_c18_pairs_are_told_apart_by_who_wrote_them():
    # human 0 < sft 1 is wrong, human > base and sft > base are right.
    metrics = reward_accuracy.evaluate(scoring([0.0, 1.0, -1.0]), [THREE], seed=0)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["accuracy/human>sft"] == 0.0
    assert metrics["accuracy/human>base"] == 1.0
    assert metrics["accuracy/sft>base"] == 1.0
    assert (metrics["pairs"], metrics["pairs/sft>base"]) == (3, 1)


def test_ties_of_rank_are_left_out_and_equal_scores_are_half_right():
    tied = ranking(["a", "b", "c"], [1, 1, 2], ["human", "sft", "base"])
    metrics = reward_accuracy.evaluate(scoring([1.0, -9.0, 1.0]), [tied], seed=0)
    assert metrics["pairs"] == 2
    assert "pairs/human>sft" not in metrics
    assert metrics["accuracy"] == pytest.approx((0.5 + 0.0) / 2)


def test_length_matched_pairs_differ_by_a_tenth_of_the_longer_at_most():
    rows = [
        ranking(["a" * 90, "b" * 100], [1, 2], ["human", "sft"]),
        ranking(["a" * 89, "b" * 100], [1, 2], ["human", "sft"]),
        ranking(["a" * 100, "b" * 91], [1, 2], ["human", "sft"]),
    ]
    metrics = reward_accuracy.evaluate(scoring([1, 0], [1, 0], [0, 1]), rows, seed=0)
    assert metrics["pairs_length_matched"] == 2
    assert metrics["accuracy_length_matched"] == 0.5
    none = reward_accuracy.evaluate(scoring([1, 0]), rows[1:2], seed=0)
    assert none["pairs_length_matched"] == 0
    assert "accuracy_length_matched" not in none


def test_c18_a_reward_model_of_length_is_found_out():
    rng = np.random.default_rng(0)
    rows = [ranking(["x" * int(n) for n in rng.integers(1, 99, 4)], [1, 2, 3, 4], ["human"] * 4) for _ in range(30)]

    def by_length(rankings):
        return [[len(text) for text in r.completions] for r in rankings]

    metrics = reward_accuracy.evaluate(by_length, rows, seed=0)
    assert metrics["length_correlation"] == pytest.approx(1.0)
    assert metrics["length_correlation_within"] == pytest.approx(1.0)
    constant = reward_accuracy.evaluate(lambda rankings: [[1.0] * 4 for _ in rankings], rows, seed=0)
    assert constant["length_correlation"] == 0.0
    assert constant["accuracy"] == 0.5


def test_correlation_within_prompts_does_not_see_that_some_prompts_want_more():
    long, short = ["x" * 100, "x" * 110], ["x" * 10, "x" * 20]
    rows = [ranking(texts, [1, 2], ["human", "sft"]) for texts in (long, short)]
    metrics = reward_accuracy.evaluate(scoring([5.1, 5.0], [1.1, 1.0]), rows, seed=0)
    assert metrics["length_correlation"] > 0.99
    assert metrics["length_correlation_within"] == pytest.approx(-1.0)


def test_c18_a_calibrated_model_has_no_calibration_error_and_a_boastful_one_has():
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, size=20_000)
    is_right = rng.random(20_000) < 1 / (1 + np.exp(-np.abs(margins)))
    pairs = [
        reward_accuracy._Pair(0, abs(m) if right else -abs(m), "a>b", "s", False)
        for m, right in zip(margins, is_right, strict=True)
    ]
    assert calibration_error(pairs) < 0.01
    boastful = [reward_accuracy._Pair(0, margin, "a>b", "s", False) for margin in (50.0, -50.0, 1e6, -1e6)]
    assert calibration_error(boastful) == pytest.approx(0.5)
    known = [reward_accuracy._Pair(0, math.log(3), "a>b", "s", False)]  # says 75 %, is right
    assert calibration_error(known) == pytest.approx(0.25)


def test_the_interval_resamples_prompts_not_pairs():
    rows = [THREE] * 2
    metrics = reward_accuracy.evaluate(scoring([3, 2, 1], [1, 2, 3]), rows, seed=0)
    assert (metrics["accuracy"], metrics["accuracy_low"], metrics["accuracy_high"]) == (0.5, 0.0, 1.0)


def test_c18_sources_are_reported_where_there_are_several():
    rows = [THREE, ranking(["a", "b"], [1, 2], ["human", "base"], source="forum")]
    metrics = reward_accuracy.evaluate(scoring([3, 2, 1], [0, 1]), rows, seed=0)
    assert (metrics["accuracy/chat"], metrics["accuracy/forum"]) == (1.0, 0.0)
    assert (metrics["pairs/chat"], metrics["pairs/human>base"]) == (3, 2)
    assert reward_accuracy.evaluate(scoring([3, 2, 1]), rows, seed=0, limit=1)["pairs"] == 3


def test_scores_that_cannot_be_used_are_refused():
    with pytest.raises(DataError, match="not a number"):
        reward_accuracy.evaluate(scoring([0.0, math.nan, 1.0]), [THREE], seed=0)
    with pytest.raises(ValueError, match="2 scores for 3"):
        reward_accuracy.evaluate(scoring([0.0, 1.0]), [THREE], seed=0)
    tied = ranking(["a", "b"], [1, 1], ["human", "sft"])
    with pytest.raises(DataError, match="different rank"):
        reward_accuracy.evaluate(scoring([0.0, 1.0]), [tied], seed=0)
