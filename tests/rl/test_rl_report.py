"""The figures of a round, against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from fledge.batches import Rollout
from fledge.rl.report import explained_variance, round_metrics, sampler_gap, update_metrics

MASK = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])


def rollout(**fields) -> Rollout:
    zero = torch.zeros(2, 3)
    names = ("old_logprobs", "reference_logprobs", "old_values", "rewards", "advantages", "returns")
    given = {f"{name}_BT": fields.get(name, zero) for name in names}
    return Rollout(
        tokens_BT=zero.long(),
        segments_BT=zero.int(),
        action_mask_BT=MASK,
        scores_B=torch.tensor([1.0, 3.0]),
        sampler_logprobs_BT=fields.get("sampler", zero),
        policy_version=0,
        **given,
    )


def test_c48_figures_of_a_round_by_hand():
    old, reference = (
        torch.tensor([[9.0, -1.0, -2.0], [9.0, -3.0, 9.0]]),
        torch.tensor([[0.0, -2.0, -1.5], [0, -3, 0]]),
    )
    rewards = torch.tensor([[0.0, 0.5, 1.0], [0.0, 3.0, 0.0]])
    metrics = round_metrics(
        rollout(old_logprobs=old, reference_logprobs=reference, rewards=rewards),
        torch.tensor([True, False]),
        torch.tensor([1.0, -1.0]),
    )
    k3 = [math.exp(-d) - 1 + d for d in (1.0, -0.5, 0.0)]
    expected = {
        "kl": (1.0 - 0.5 + 0.0) / 2,
        "kl_per_token": 0.5 / 3,
        "kl_k3": sum(k3) / 2,
        "entropy": 2.0,
        "score_mean": 2.0,
        "score_std": 1.0,
        "shaped_score_mean": 0.0,
        "shaped_score_std": 1.0,
        "episode_reward": 2.25,
        "response_length": 1.5,
        "end_rate": 0.5,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_explained_variance_is_one_for_perfect_values_zero_for_a_constant_negative_for_worse():
    returns = torch.tensor([[0.0, 1.0, 2.0], [0.0, 4.0, 99.0]])
    assert explained_variance(returns, returns, MASK).item() == pytest.approx(1)
    assert explained_variance(torch.full((2, 3), 7.0), returns, MASK).item() == pytest.approx(0)
    assert explained_variance(-returns, returns, MASK).item() < 0


def test_c25_sampler_gap_is_the_mean_difference_of_probabilities_over_actions():
    old = torch.tensor([[0.5, 0.5, 0.25], [0.5, 1.0, 0.1]]).log()
    sampler = torch.tensor([[0.1, 0.5, 0.5], [0.9, 0.9, 0.9]]).log()
    gap = sampler_gap(rollout(old_logprobs=old, sampler=sampler))
    assert gap["sampler_gap"] == pytest.approx((0.0 + 0.25 + 0.1) / 3)
    assert gap["sampler_gap_max"] == pytest.approx(0.25)
    assert gap["sampler_logprob_gap"] == pytest.approx(math.log(2))


def test_update_figures_keep_extremes_and_the_first_gap_and_average_the_rest():
    steps = [
        {"loss": 1.0, "ratio_min": 0.9, "ratio_max": 1.0, "ratio_gap": 0.0},
        {"loss": 3.0, "ratio_min": 0.7, "ratio_max": 1.4, "ratio_gap": 0.4},
    ]
    assert update_metrics(steps) == {"loss": 2.0, "ratio_min": 0.7, "ratio_max": 1.4, "ratio_gap": 0.0}
