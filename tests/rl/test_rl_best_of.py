"""Best of n and rejection sampling: the choice, its distance from the policy, and what it is worth."""

from __future__ import annotations

import itertools
import math

import pytest
import rl_toy as toy
import torch

from fledge.errors import ConfigError, DataError
from fledge.rl.best_of import Scored, accepted, best, expected_best, kl_bound, sample_scored
from fledge.types import Completion

NAN = math.nan


def said(*ids: int) -> Completion:
    return Completion("", ids, (0.0,) * len(ids), "stop")


def scored(*scores: float, prompt=(3,)) -> Scored:
    return Scored(prompt, tuple(said(10 + place) for place in range(len(scores))), scores)


@pytest.mark.parametrize(("n", "nats"), [(1, 0.0), (2, 0.193147), (4, 0.636294), (16, 1.835089), (64, 3.174508)])
def test_c55_kl_bound_known_answers(n, nats):
    assert kl_bound(n) == pytest.approx(nats, abs=1e-6)


def test_c55_kl_bound_is_the_divergence_itself_where_scores_differ():
    """A policy uniform over many answers: best-of-n draws the answer of rank i with chance (i^n - (i-1)^n) / M^n."""
    num_answers, n = 4000, 5
    rank = torch.arange(1, num_answers + 1, dtype=torch.float64)
    chance = (rank**n - (rank - 1) ** n) / num_answers**n
    divergence = float((chance * (chance * num_answers).log()).sum())
    assert divergence == pytest.approx(kl_bound(n), abs=1e-3)
    assert divergence <= kl_bound(n)


def test_c55_best_is_the_argmax_and_an_answer_without_a_score_is_never_it():
    assert scored(0.5, 2.0, -1.0).best == 1
    assert scored(NAN, -5.0, NAN).best == 1
    assert scored(1.0, 1.0).best == 0
    assert scored(NAN).best is None
    assert best([scored(0.5, 2.0), scored(NAN, NAN)]) == [((3,), said(11))]


def test_rejection_sampling_keeps_what_is_good_enough_best_first_and_each_once():
    one = scored(0.5, 2.0, NAN, 1.0)
    assert [completion.ids for _, completion in accepted([one], threshold=1.0)] == [(11,), (13,)]
    assert [completion.ids for _, completion in accepted([one], top=1)] == [(11,)]
    assert [completion.ids for _, completion in accepted([one], threshold=0.0, top=2)] == [(11,), (13,)]
    twice = Scored((3,), (said(7), said(7), said(8)), (2.0, 2.0, 1.0))
    assert [completion.ids for _, completion in accepted([twice], top=2)] == [(7,), (8,)]
    for wrong in ({}, {"top": 0}):
        with pytest.raises(ConfigError):
            accepted([one], **wrong)


def test_c55_expected_best_equals_the_mean_over_all_choices():
    generator = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)
    for n in range(1, 7):
        found = [
            float(gold[row][max(chosen, key=lambda place: proxy[row, place])])
            for row in range(3)
            for chosen in itertools.combinations(range(6), n)
        ]
        assert expected_best(proxy, n, gold) == pytest.approx(sum(found) / len(found), abs=1e-6)
    assert expected_best(proxy, 6) == pytest.approx(float(proxy.amax(1).mean()), abs=1e-6)
    with pytest.raises(ConfigError, match="best of 7"):
        expected_best(proxy, 7)
    with pytest.raises(DataError, match="missing"):
        expected_best(torch.tensor([[1.0, NAN]]), 1)


def sampled(n: int, num_prompts: int, seed: int = 0) -> list[Scored]:
    world = toy.world()
    shape = world.shape(toy.PROMPT, toy.RESPONSE)
    return sample_scored(world, toy.language_model(), toy.prompts(num_prompts), shape, n=n, seed=seed)


def test_c55_answers_follow_their_prompts_and_are_scored_one_by_one():
    found = sampled(3, 5)
    assert [one.prompt for one in found] == toy.prompts(5)
    for one in found:
        assert len(one.completions) == 3
        for completion, score in zip(one.completions, one.scores, strict=True):
            letters = [token for token in completion.ids if token >= toy.LETTER_A]
            assert score == pytest.approx(letters.count(toy.LETTER_A) / max(1, len(letters)))
    assert sampled(3, 5) == found
    assert sampled(3, 5, seed=1) != found


def test_c55_the_best_of_more_is_better():
    found = sampled(16, 40)
    scores = torch.tensor([one.scores for one in found])
    curve = [expected_best(scores, n) for n in (1, 4, 16)]
    assert curve == sorted(curve)
    assert curve[2] > curve[0] + 0.05
    chosen = sum(one.scores[one.best] for one in found) / len(found)
    assert chosen == pytest.approx(curve[2], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_c55_the_best_of_more_is_better_up_to_64_for_every_seed(seed):
    scores = torch.tensor([one.scores for one in sampled(64, 40, seed)])
    curve = [expected_best(scores, n) for n in (1, 4, 16, 64)]
    assert all(later > earlier for earlier, later in itertools.pairwise(curve))
    assert curve[-1] > curve[0] + 0.15
