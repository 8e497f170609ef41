"""Sums of rewards: weights, records found by prompt, failures that are recorded, bounded and never 0."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import rl_toy as toy
import torch

from fledge.errors import ConfigError, DataError, TrainingHalted
from fledge.rl.actors import PolicyPair
from fledge.rl.confine import can_filter
from fledge.rl.grpo import GRPO, GRPOConfig
from fledge.rl.judge import Judge, Verifier
from fledge.rl.rewards import FunctionReward, Part, Records, RewardSum, VerifierReward, bounded
from fledge.rl.rollout import Episodes, EpisodeShape, lay_out
from fledge.types import Completion

PROMPTS = [(toy.END, 3, 4), (toy.END, 5)]
RECORDS = Records.of(PROMPTS, [{"answer": "ab"}, {"answer": "c"}])


def episodes() -> Episodes:
    shape = EpisodeShape(toy.PROMPT, toy.RESPONSE, toy.PAD, frozenset({toy.END}), toy.END)
    said = [(2, 3, toy.END), (4, 4), (4, toy.END)]
    completions = [Completion("", ids, (0.0,) * len(ids), "stop") for ids in said]
    return lay_out([PROMPTS[0], PROMPTS[0], PROMPTS[1]], completions, shape)


def rewards(*parts, **options) -> RewardSum:
    return RewardSum(parts, RECORDS, toy.decode, frozenset({toy.END}), **options)


def test_score_is_the_weighted_sum_of_all_parts():
    total = rewards(
        Part.model("model", lambda given: torch.tensor([1.0, 2.0, 3.0]), 0.5),
        Part.text("length", FunctionReward(lambda attempt: float(len(attempt.completion))), -2.0),
    )
    assert total(episodes()).tolist() == [0.5 * 1 - 2 * 2, 0.5 * 2 - 2 * 2, 0.5 * 3 - 2 * 1]
    assert total.figures() == {
        "reward/model": 2.0,
        "reward_failed/model": 0.0,
        "reward/length": pytest.approx(5 / 3),
        "reward_failed/length": 0.0,
    }
    assert total.figures() == {}


def test_functions_see_the_text_the_record_and_whether_the_answer_ended():
    seen = []
    rewards(Part.text("look", FunctionReward(lambda attempt: seen.append(attempt) or 0.0)))(episodes())
    assert [attempt.completion for attempt in seen] == ["ab", "cc", "c"]
    assert [attempt.record["answer"] for attempt in seen] == ["ab", "ab", "c"]
    assert [attempt.ended for attempt in seen] == [True, False, True]
    assert [attempt.num_tokens for attempt in seen] == [3, 2, 2]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda attempt: 1 / 0 if attempt.completion == "cc" else 1.0, "ZeroDivisionError"),
        (lambda attempt: math.nan if attempt.completion == "cc" else 1.0, "expected a finite number"),
        (lambda attempt: None if attempt.completion == "cc" else 1.0, "TypeError"),
        (lambda attempt: spin() if attempt.completion == "cc" else 1.0, "no score within 0.2 seconds"),
    ],
)
def test_c54_function_that_raises_or_hangs_is_recorded_and_never_becomes_zero(function, reason):
    told = []
    total = rewards(
        Part.text("mine", FunctionReward(function, seconds=0.2)),
        Part.model("model", lambda given: torch.ones(3)),
        max_failed=0.5,
        on_failure=told.append,
    )
    scores = total(episodes())
    assert scores[[0, 2]].tolist() == [2.0, 2.0]
    assert scores[1].isnan()
    assert [(failure.part, failure.completion) for failure in told] == [("mine", "cc")]
    assert reason in told[0].reason
    assert total.failures == told
    assert total.figures()["reward_failed/mine"] == pytest.approx(1 / 3)


def spin() -> float:
    while True:
        time.sleep(0.001)


def test_c54_thread_of_a_function_that_hangs_ends():
    import threading

    before = threading.active_count()
    assert bounded(lambda attempt: spin(), None, 0.1) == "no score within 0.1 seconds"
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_c54_too_many_failures_end_the_run_with_the_first_reason():
    with pytest.raises(TrainingHalted, match=r"33%.*at most 10%.*mine: ZeroDivisionError"):
        rewards(Part.text("mine", FunctionReward(lambda a: 1 / (a.completion != "cc"))), max_failed=0.1)(episodes())


def test_prompt_without_a_record_or_with_two_is_refused():
    with pytest.raises(DataError, match="two different records"):
        Records.of([PROMPTS[0], PROMPTS[0]], [{"answer": 1}, {"answer": 2}])
    total = RewardSum([Part.text("mine", FunctionReward(len))], Records({}), toy.decode, frozenset())
    with pytest.raises(DataError, match="no record"):
        total(episodes())


@pytest.mark.parametrize(
    "make",
    [
        lambda: rewards(),
        lambda: rewards(Part.model("a", len), Part.model("a", len)),
        lambda: rewards(Part.model("a", len, 0.0)),
        lambda: rewards(Part.model("a", len, math.inf)),
        lambda: rewards(Part.model("a", len), max_failed=2.0),
    ],
)
def test_sum_that_makes_no_sense_is_refused(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.skipif(not can_filter(), reason="no filter of system calls for this machine")
def test_c54_verifier_is_a_reward_like_any_other_in_a_whole_round():
    prompts = toy.prompts()
    with Judge(1) as judge:
        total = RewardSum(
            [
                Part.text("starts_with_a", VerifierReward(Verifier("regex", {"pattern": "^a"}), judge)),
                Part.text("share", FunctionReward(lambda attempt: attempt.completion.count("a") / 12), 0.1),
            ],
            Records.of(prompts, [{} for _ in prompts]),
            toy.decode,
            frozenset({toy.END}),
        )
        config = GRPOConfig(
            rounds=1, prompts=2, group=4, minibatch=8, warmup_rounds=0, prompt_length=6, response_length=12
        )
        result = GRPO(config, PolicyPair.start(toy.language_model()), replace(toy.world(), scorer=total)).round()
    verified = [1.0 if completion.text.startswith("a") else 0.0 for completion in result.completions]
    assert result.metrics["reward/starts_with_a"] == pytest.approx(sum(verified) / 8)
    shares = [completion.text.count("a") / 12 for completion in result.completions]
    expected = [full + 0.1 * share for full, share in zip(verified, shares, strict=True)]
    assert result.rollout.scores_B.tolist() == pytest.approx(expected, abs=1e-6)
