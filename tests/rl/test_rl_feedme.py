"""FeedME: what is kept, what is learned from, that it is resumed to the bit, and that it learns."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import rl_toy as toy
import torch

from fledge.errors import ConfigError, DataError
from fledge.rl.best_of import Scored
from fledge.rl.feedme import FeedME, FeedMEConfig, keep_rated, piece_of, rated_high
from fledge.train.optim import OptimConfig
from fledge.types import Completion

SMALL = FeedMEConfig(
    rounds=3,
    prompts=8,
    samples=4,
    threshold=None,
    top=1,
    steps=2,
    rows=8,
    prompt_length=toy.PROMPT,
    response_length=toy.RESPONSE,
    optim=OptimConfig.adamw(1e-3, decay=0.0),
)
SHOWN = [((toy.END, 4), (5, 6, toy.END)), ((toy.END, 7), (8, toy.END))]


def said(*ids: int) -> Completion:
    return Completion("", ids, (0.0,) * len(ids), "stop")


def feedme(config=SMALL, demonstrations=SHOWN, held_out=(), scorer=toy.share_of_a) -> FeedME:
    return FeedME(config, toy.language_model(), toy.world(scorer), demonstrations, held_out)


def test_c55_kept_are_ratings_of_at_least_the_threshold_that_end_once_each_and_to_prompts_not_held_out():
    end = toy.END
    scored = [
        Scored((3,), (said(5, end), said(6, end), said(7, end), said(5, end)), (7.0, 6.9, math.nan, 7.0)),
        Scored((4,), (said(5, end), said(8, 9)), (7.0, 7.0)),
        Scored((5,), (said(9, end),), (7.0,)),
    ]
    options = {"threshold": 7.0, "top": None, "end_id": end, "held_out": frozenset({(5,)})}
    assert keep_rated(scored, **options) == [((3,), (5, end)), ((4,), (5, end))]
    known = frozenset({((3,), (5, end))})
    assert keep_rated(scored, **options, known=known) == [((4,), (5, end))]
    assert keep_rated(scored[:1], **(options | {"threshold": None, "top": 2})) == [((3,), (5, end)), ((3,), (6, end))]


def test_c55_held_out_prompts_are_neither_asked_nor_learned_from():
    held_out = toy.prompts()[::2]
    run = feedme(demonstrations=(), held_out=held_out)
    for _ in range(3):
        result = run.round()
        assert not {one.prompt for one in result.scored} & set(held_out)
    assert run.kept
    assert not {prompt for prompt, _ in run.kept} & set(held_out)
    with pytest.raises(DataError, match="held out"):
        feedme(held_out=[SHOWN[0][0]])
    with pytest.raises(DataError, match="every prompt"):
        feedme(demonstrations=(), held_out=toy.prompts())


def test_c55_kept_answers_of_all_rounds_are_distinct():
    run = feedme(replace(SMALL, rounds=6))
    for _ in range(6):
        run.round()
    assert len(set(run.kept)) == len(run.kept)


def test_c55_answers_that_people_rated_high_enough_are_demonstrations_once_each():
    good, fair = ((3,), (5, toy.END)), ((3,), (6, toy.END))
    assert rated_high([(good, 7.0), (fair, 6.9), (good, 7.0)], SMALL) == [good]
    assert rated_high([(good, 7.0), (fair, 6.9)], replace(SMALL, rating=6.0)) == [good, fair]


def test_loss_counts_on_the_reply_alone():
    piece = piece_of((1, 2, 3), (4, 5))
    assert piece.ids.tolist() == [1, 2, 3, 4, 5]
    assert piece.loss_mask.tolist() == [0, 0, 0, 1, 1]


def test_steps_take_demonstrations_and_kept_answers_in_the_stated_shares():
    run = feedme(replace(SMALL, rows=20, demonstration_share=0.3))
    run.round()
    rows = run._rows(5)
    assert len(rows) == 20
    assert [row in SHOWN for row in rows] == [True] * 6 + [False] * 14
    assert all(row in run.kept for row in rows[6:])
    assert run._rows(5) == rows != run._rows(6)
    run.kept = []
    assert all(row in SHOWN for row in run._rows(5)), "demonstrations alone until something is kept"


def test_round_that_keeps_nothing_says_so_and_learns_nothing():
    run = feedme(replace(SMALL, threshold=2.0), demonstrations=())
    before = {name: tensor.clone() for name, tensor in run.policy.state_dict().items()}
    metrics = run.round().metrics
    assert (metrics["kept"], metrics["steps"]) == (0, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.policy.state_dict().items())


def test_c54_answer_without_a_rating_is_counted_and_never_kept():
    def flaky(episodes):
        scores = toy.share_of_a(episodes)
        scores[::4] = float("nan")
        return scores

    result = feedme(replace(SMALL, top=4), scorer=flaky).round()
    assert result.metrics["failed_rewards"] == 0.25
    kept = set(result.kept)
    for one in result.scored:
        first = (one.prompt, one.completions[0].ids)
        others = {(one.prompt, completion.ids) for completion in one.completions[1:]}
        assert first in others or first not in kept


def test_c50_run_that_is_resumed_equals_the_uninterrupted_one_to_the_bit():
    whole = feedme()
    told = [whole.round().metrics for _ in range(3)]
    broken_off = feedme()
    broken_off.round()
    tensors = {name: tensor.clone() for name, tensor in broken_off.tensors().items()}
    resumed = feedme()
    resumed.load(tensors, json.loads(json.dumps(broken_off.scalars())))
    assert [resumed.round().metrics for _ in range(2)] == told[1:]
    assert resumed.scalars() == whole.scalars()
    assert all(torch.equal(tensor, whole.tensors()[name]) for name, tensor in resumed.tensors().items())


@pytest.mark.parametrize(
    "wrong", [{"threshold": None, "top": None}, {"top": 0}, {"steps": 0}, {"demonstration_share": 1.5}]
)
def test_contradictory_options_are_refused(wrong):
    with pytest.raises((ConfigError, ValueError)):
        replace(SMALL, **wrong)


def history(seed: int, rounds: int) -> list[float]:
    config = replace(SMALL, rounds=rounds, prompts=40, samples=8, steps=30, rows=32, seed=seed)
    run = feedme(config, demonstrations=())
    return [run.round().metrics["score_mean"] for _ in range(rounds)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_c55_every_round_of_learning_from_the_best_of_eight_is_better_than_the_last(seed):
    means = history(seed, 4)
    assert means == sorted(means)
    assert means[-1] >= means[0] + 0.25


def test_two_rounds_raise_the_share_of_a():
    means = history(0, 2)
    assert means[1] > means[0] + 0.05
