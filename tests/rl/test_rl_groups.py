"""Advantages within groups and the normalisations of the loss: known answers and invariants."""

from __future__ import annotations

import pytest
import torch

from fledge.rl.groups import group_advantages, loss_weights, overlong_penalty, spread

SCORES = torch.tensor([1.0, 0.0, 0.0, 1.0])
MASK = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        ("mean", "std", 0.865875),
        ("mean", "population_std", 0.9998),
        ("mean", "none", 0.5),
        ("leave_one_out", "none", 0.666667),
    ],
)
def test_c52_c53_known_answers(baseline, scale, expected):
    found = group_advantages(SCORES, 4, baseline=baseline, scale=scale)
    assert found.tolist() == pytest.approx([expected, -expected, -expected, expected], abs=1e-5)


@pytest.mark.parametrize("scale", ["std", "population_std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_c52_group_without_spread_has_advantage_zero_exactly(baseline, scale):
    scores = torch.tensor([0.9, 0.9, 0.9, 0.1, 0.1, 0.7])  # in float32 the mean of three 0.9 is not 0.9
    found = group_advantages(scores, 3, baseline=baseline, scale=scale)
    assert found[:3].tolist() == [0.0, 0.0, 0.0]
    assert (found[3:] != 0).all()
    assert spread(scores, 3).tolist() == [False, True]


def test_leave_one_out_is_the_score_minus_the_mean_of_the_others():
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    found = group_advantages(scores, 4, baseline="leave_one_out", scale="none")
    for place in range(12):
        group = [i for i in range(12) if i // 4 == place // 4 and i != place]
        assert found[place].item() == pytest.approx(float(scores[place] - scores[group].mean()), abs=1e-6)


def test_groups_do_not_see_each_other_and_a_constant_changes_nothing():
    scores = torch.randn(8, generator=torch.Generator().manual_seed(1))
    whole = group_advantages(scores, 4, baseline="mean", scale="std")
    alone = group_advantages(scores[4:], 4, baseline="mean", scale="std")
    shifted = group_advantages(scores + 3, 4, baseline="mean", scale="std")
    assert torch.equal(whole[4:], alone)
    assert torch.allclose(whole, shifted, atol=1e-5)
    assert whole.view(2, 4).sum(dim=1).abs().max() < 1e-5


def test_c54_score_that_could_not_be_had_takes_no_part_in_its_group():
    nan = float("nan")
    for baseline, scale in (("mean", "std"), ("leave_one_out", "none")):
        with_gap = group_advantages(torch.tensor([1.0, nan, 0.0, 0.5]), 4, baseline=baseline, scale=scale)
        without = group_advantages(torch.tensor([1.0, 0.0, 0.5]), 3, baseline=baseline, scale=scale)
        assert with_gap[[0, 2, 3]].tolist() == pytest.approx(without.tolist(), abs=1e-6)
        assert with_gap[1] == 0
    lonely = group_advantages(torch.tensor([nan, 1.0, nan, nan]), 2, baseline="leave_one_out", scale="std")
    assert lonely.tolist() == [0, 0, 0, 0]
    assert spread(torch.tensor([nan, 1.0, nan, nan]), 2).tolist() == [False, False]


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [
        ("answer", (1 + 5) / 2),  # GRPO: mean over answers of the mean over tokens
        ("token", (3 * 1 + 5) / 4),  # DAPO: mean over tokens
        ("limit", (3 * 1 + 5) / (2 * 6)),  # Dr. GRPO: sum over answers x a constant
        ("sum", (3 * 1 + 5) / 2),  # RLOO: mean over answers of the sum
    ],
)
def test_c53_normalisations_known_answers(normalise, expected):
    loss = torch.tensor([[9.0, 1.0, 1.0, 1.0], [9.0, 5.0, 9.0, 9.0], [9.0] * 4])
    weights, shares = loss_weights(MASK, normalise, 6)
    assert float((loss * weights).sum() / shares.sum()) == pytest.approx(expected)
    assert (weights[MASK == 0] == 0).all()
    assert shares[2] == 0, "an episode without actions adds nothing"


def test_c53_overlong_penalty_falls_linearly_over_the_buffer():
    lengths = torch.tensor([3.0, 8.0, 9.0, 10.0, 12.0])
    assert overlong_penalty(lengths, limit=12, buffer=4).tolist() == [0, 0, -0.25, -0.5, -1]
