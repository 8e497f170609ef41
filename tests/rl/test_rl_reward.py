"""From scores to token rewards: where the score lands, what the KL costs, what a missing end costs."""

from __future__ import annotations

import pytest
import torch

from fledge.rl.reward import Moments, RewardConfig, last_action, shape_scores, token_rewards

MASK = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
SCORES, ENDED = torch.tensor([2.0, -3.0, 0.5]), torch.tensor([True, False, True])
KEEP = RewardConfig(missing_end_score=None)


def deltas() -> torch.Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def test_c26_score_lands_on_the_last_response_token():
    rewards = token_rewards(torch.zeros(3, 6), SCORES, MASK, beta=0.1)
    expected = torch.zeros(3, 6)
    expected[0, 3], expected[1, 5], expected[2, 1] = SCORES
    assert torch.equal(rewards, expected)
    assert last_action(MASK).tolist() == [3, 5, 1]


def test_c26_reward_of_a_token_is_minus_beta_times_its_log_ratio():
    rewards = token_rewards(deltas(), torch.zeros(3), MASK, beta=0.3)
    assert torch.allclose(rewards, -0.3 * deltas() * MASK)


def test_c27_kl_rewards_add_up_to_minus_beta_times_the_log_ratio_and_are_zero_for_the_reference_itself():
    rewards = token_rewards(deltas(), torch.zeros(3), MASK, beta=0.3)
    assert torch.allclose(rewards.sum(1), -0.3 * (deltas() * MASK).sum(1), atol=1e-6)
    assert (token_rewards(torch.zeros(3, 6), torch.zeros(3), MASK, beta=0.3) == 0).all()


def test_c27_a_token_the_policy_likes_more_than_the_reference_is_punished():
    assert token_rewards(torch.ones(3, 6), torch.zeros(3), MASK, beta=0.3).sum() < 0


def test_c32_there_is_no_reward_outside_the_actions():
    rewards = token_rewards(torch.full((3, 6), float("inf")).masked_fill(MASK > 0, 0.5), SCORES, MASK, beta=0.3)
    assert (rewards[MASK == 0] == 0).all()


def test_c31_whitened_rewards_keep_their_mean_over_actions():
    plain = token_rewards(deltas(), SCORES, MASK, beta=0.3)[MASK > 0]
    whitened = token_rewards(deltas(), SCORES, MASK, beta=0.3, whiten_rewards=True)[MASK > 0]
    assert whitened.mean().item() == pytest.approx(plain.mean().item(), abs=1e-5)
    assert whitened.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_c23_answer_without_its_end_is_scored_minus_one_whatever_it_says():
    assert shape_scores(SCORES, ENDED, RewardConfig(), Moments()).tolist() == [2.0, -1.0, 0.5]


def test_c23_penalty_is_subtracted_instead_if_asked_for():
    config = RewardConfig(missing_end_score=None, missing_end_penalty=0.25)
    assert shape_scores(SCORES, ENDED, config, Moments()).tolist() == [2.0, -3.25, 0.5]
    assert shape_scores(SCORES, ENDED, KEEP, Moments()).tolist() == SCORES.tolist()


def test_c33_scores_are_normalised_then_clipped_and_the_price_of_a_missing_end_is_left_alone():
    moments = Moments().with_scores(torch.tensor([0.0, 2.0]))  # mean 1, spread 1
    config = RewardConfig(normalise=True, clip=0.75)
    assert shape_scores(SCORES, ENDED, config, moments).tolist() == pytest.approx([0.75, -1.0, -0.5])
    unclipped = RewardConfig(missing_end_score=None, normalise=True)
    assert shape_scores(SCORES, ENDED, unclipped, moments).tolist() == pytest.approx([1.0, -4.0, -0.5])


def test_c33_scores_are_clipped_from_above_and_from_below():
    config = RewardConfig(missing_end_score=None, clip=1.5)
    assert shape_scores(SCORES, ENDED, config, Moments()).tolist() == [1.5, -1.5, 0.5]


def test_running_moments_equal_those_of_all_scores_together():
    parts = torch.randn(60, generator=torch.Generator().manual_seed(1)).mul(3).add(2).split([7, 1, 52])
    moments = Moments()
    for part in parts:
        moments = moments.with_scores(part)
    together = torch.cat(parts).double()
    assert moments.count == 60
    assert moments.mean == pytest.approx(together.mean().item(), abs=1e-9)
    assert moments.std == pytest.approx(together.std(correction=0).item(), abs=1e-9)
    assert Moments(**moments.to_json()) == moments


@pytest.mark.parametrize(
    "wrong",
    [
        {"missing_end_score": -1.0, "missing_end_penalty": 1.0},
        {"missing_end_score": None, "missing_end_penalty": -1.0},
        {"clip": 0.0},
    ],
)
def test_contradictory_options_are_refused(wrong):
    with pytest.raises(ValueError):
        RewardConfig(**wrong)
