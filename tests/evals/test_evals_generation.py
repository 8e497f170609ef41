"""Figures of answers with known values; KL estimates against those that training uses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fledge.errors import DataError
from fledge.evals import generation
from fledge.objectives import kl
from fledge.types import Completion

STOP = 9


def answer(text, ids, logprobs, reason="stop"):
    return Completion(text, tuple(ids), tuple(logprobs), reason)


def test_figures_of_two_known_answers():
    ended = answer("a b", [1, 2, STOP], [-1.0, -2.0, -3.0])
    cut = answer("", [1, 2], [-4.0, -5.0], "length")
    metrics = generation.describe([ended, cut])
    assert metrics == pytest.approx(
        {
            "answers": 2,
            "share_ended": 0.5,
            "share_empty": 0.5,
            "share_distinct": 1.0,
            "answer_tokens": 2.5,
            "answer_characters": 1.5,
            "entropy": 3.0,
            "distinct_1": 2 / 4,
            "distinct_2": 1 / 2,
            "distinct_3": 0.0,
        }
    )


def test_entropy_of_draws_estimates_the_entropy_of_the_distribution():
    probabilities = np.asarray([0.5, 0.25, 0.25])
    drawn = np.random.default_rng(0).choice(3, size=20_000, p=probabilities)
    completion = answer("", drawn, np.log(probabilities[drawn]), "length")
    assert generation.describe([completion])["entropy"] == pytest.approx(1.5 * math.log(2), abs=0.01)


def test_a_model_that_repeats_itself_is_less_distinct():
    assert generation.distinct([[1, 1, 1, 1]], 1) == 0.25
    assert generation.distinct([[1, 2, 3, 4]], 1) == 1.0
    assert generation.distinct([[1, 2], [1, 2]], 2) == 0.5
    assert generation.describe([answer("x", [1], [-1])] * 4)["share_distinct"] == 0.25


def test_the_generator_is_given_the_first_prompts_only():
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return [answer("x", [1, STOP], [-1.0, -1.0])] * len(prompts)

    assert generation.evaluate(generate, [[0, 1], [0, 2], [0, 3]], limit=2)["answers"] == 2
    assert asked == [[0, 1], [0, 2]]
    with pytest.raises(DataError, match="no prompts"):
        generation.evaluate(generate, [])


def test_c35_kl_estimates_equal_those_that_training_uses():
    policy = [np.asarray([-1.0, -2.0]), np.asarray([-0.5])]
    reference = [np.asarray([-1.1, -1.8]), np.asarray([-0.5])]
    metrics = generation.kl_estimates(policy, reference)
    assert metrics["kl_k1"] == pytest.approx((0.1 - 0.2 + 0) / 3)
    assert metrics["kl_k3"] == pytest.approx((0.004837 + 0.021403 + 0) / 3, abs=1e-6)
    assert metrics["kl_k3_answer"] == pytest.approx((0.004837 + 0.021403) / 2, abs=1e-6)
    assert metrics["kl_k1_answer"] == pytest.approx(-0.1 / 2)
    delta = torch.tensor([0.1, -0.2, 0.0, 50.0, -50.0], dtype=torch.float64)
    ours = generation.kl_estimates([delta.numpy()], [np.zeros(5)])
    assert ours["kl_k1"] == pytest.approx(float(kl.k1(delta).mean()))
    assert generation.MAX_LOG_RATIO == kl.MAX_LOG_RATIO
    assert ours["kl_k3"] == pytest.approx(float(kl.k3(delta).mean()))


def test_both_kl_estimates_agree_with_the_divergence_of_the_distributions():
    policy, reference = np.asarray([0.7, 0.2, 0.1]), np.asarray([0.5, 0.2, 0.3])
    drawn = np.random.default_rng(0).choice(3, size=100_000, p=policy)
    metrics = generation.kl_estimates([np.log(policy[drawn])], [np.log(reference[drawn])])
    divergence = float(np.sum(policy * np.log(policy / reference)))
    assert metrics["kl_k1"] == pytest.approx(divergence, abs=0.01)
    assert metrics["kl_k3"] == pytest.approx(divergence, abs=0.01)


class FixedScorer:
    """Token t costs `nats` x t, so that a wrong slice shows."""

    row_length = None

    def __init__(self, nats):
        self.nats = nats

    def logprobs(self, sequences, first=None):
        pairs = zip(sequences, first, strict=True)
        return [-self.nats * np.asarray(tokens[start:], dtype=np.float64) for tokens, start in pairs]


def test_kl_is_taken_over_the_drawn_tokens_alone():
    completions = [answer("x", [3, 4], [0, 0]), answer("", [], [], "length")]
    metrics = generation.evaluate_kl(FixedScorer(1.0), FixedScorer(2.0), [[100, 200], [300]], completions)
    assert metrics["kl_k1"] == pytest.approx((3 + 4) / 2)
    assert generation.evaluate_kl(FixedScorer(1.0), FixedScorer(1.0), [[5], [6]], completions)["kl_k3"] == 0.0
    with pytest.raises(DataError, match="no answer holds a token"):
        generation.evaluate_kl(FixedScorer(1.0), FixedScorer(1.0), [[5]], completions[1:])


def test_kl_per_answer_counts_only_answers_with_tokens():
    completions = [answer("x", [3], [0]), answer("", [], [], "length")]
    metrics = generation.evaluate_kl(FixedScorer(1.0), FixedScorer(2.0), [[1], [1]], completions)
    assert metrics["kl_k1_answer"] == pytest.approx(3.0)
