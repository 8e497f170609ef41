"""The self-checks of a round: silent about a sound one, clear about the fault each is there for; the algorithm halts,
with the batch on disk."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import rl_toy as toy
import torch

from fledge.batches import Rollout
from fledge.errors import TrainingHalted
from fledge.rl import grpo as grpo_module
from fledge.rl import ppo as ppo_module
from fledge.rl.actors import PolicyPair
from fledge.rl.checks import moved_at_the_start, sampler_disagrees, score_is_elsewhere
from fledge.rl.grpo import GRPO, GRPOConfig
from fledge.rl.reward import token_rewards

SMALL = toy.config(rounds=1, episodes=8, minibatch=8)


@cache
def sound() -> tuple[Rollout, torch.Tensor, float]:
    """A round of PPO as it should be, the scores it was paid, the price of KL."""
    ppo = toy.ppo(SMALL)
    kept: dict[str, Any] = {}
    whole = ppo_module.score_is_elsewhere

    def keep(rollout: Rollout, shaped_B: torch.Tensor, beta: float) -> str | None:
        kept.update(rollout=rollout, shaped_B=shaped_B, beta=beta)
        return whole(rollout, shaped_B, beta)

    ppo_module.score_is_elsewhere = keep  # type: ignore[assignment]
    try:
        ppo.round()
    finally:
        ppo_module.score_is_elsewhere = whole
    return kept["rollout"], kept["shaped_B"], kept["beta"]


def test_a_sound_round_gives_no_complaint() -> None:
    rollout, shaped_B, beta = sound()
    assert moved_at_the_start(rollout, 1e-5) is None
    assert score_is_elsewhere(rollout, shaped_B, beta) is None
    assert sampler_disagrees(rollout) is None


def test_c27_a_reference_that_is_not_the_policy_is_seen_before_the_first_step() -> None:
    rollout, _, _ = sound()
    moved = replace(rollout, reference_logprobs_BT=rollout.reference_logprobs_BT + 0.01 * rollout.action_mask_BT)
    assert "KL is not 0 at step 0" in str(moved_at_the_start(moved, 1e-5))
    beside = replace(rollout, reference_logprobs_BT=rollout.reference_logprobs_BT + (1 - rollout.action_mask_BT))
    assert moved_at_the_start(beside, 1e-5) is None


def test_c26_a_score_beside_the_end_of_its_answer_is_seen() -> None:
    rollout, shaped_B, beta = sound()
    late = replace(rollout, rewards_BT=rollout.rewards_BT.roll(-1, dims=1))
    assert "does not stand at the end" in str(score_is_elsewhere(late, shaped_B, beta))
    doubled = replace(rollout, rewards_BT=2 * rollout.rewards_BT)
    assert "does not stand at the end" in str(score_is_elsewhere(doubled, shaped_B, beta))


def test_c27_a_price_of_kl_with_the_wrong_sign_is_seen() -> None:
    rollout, shaped_B, _ = sound()
    mask_BT = rollout.action_mask_BT
    far = replace(rollout, reference_logprobs_BT=rollout.old_logprobs_BT - 0.5 * mask_BT)
    paid_BT = token_rewards(0.5 * mask_BT, shaped_B, mask_BT, beta=0.1)
    assert score_is_elsewhere(replace(far, rewards_BT=paid_BT), shaped_B, 0.1) is None
    wrong_BT = token_rewards(-0.5 * mask_BT, shaped_B, mask_BT, beta=0.1)
    assert score_is_elsewhere(replace(far, rewards_BT=wrong_BT), shaped_B, 0.1) is not None


def test_c25_an_engine_that_draws_from_another_distribution_is_seen() -> None:
    rollout, _, _ = sound()
    mask_BT = rollout.action_mask_BT
    colder = replace(rollout, sampler_logprobs_BT=rollout.sampler_logprobs_BT * torch.where(mask_BT > 0, 0.7, 1.0))
    assert "engine and trainer disagree" in str(sampler_disagrees(colder))


@pytest.mark.parametrize(("gap", "is_seen"), [(0.004, False), (0.0099, False), (0.0101, True)])
def test_c25_the_alarm_is_a_mean_difference_of_probability_of_a_hundredth(gap: float, is_seen: bool) -> None:
    rollout, _, _ = sound()
    even = torch.full_like(rollout.old_logprobs_BT, 0.5).log()
    apart = replace(rollout, old_logprobs_BT=even, sampler_logprobs_BT=torch.full_like(even, 0.5 - gap).log())
    assert (sampler_disagrees(apart) is not None) == is_seen


def ppo(folder: Path) -> toy.PPO:
    return toy.ppo(SMALL, toy.world(dump_folder=folder))


def grpo(folder: Path) -> GRPO:
    config = GRPOConfig(
        rounds=1, prompts=2, group=4, minibatch=8, warmup_rounds=0, prompt_length=toy.PROMPT, response_length=8
    )
    return GRPO(config, PolicyPair.start(toy.language_model()), toy.world(dump_folder=folder))


@pytest.mark.parametrize(
    ("module", "make", "name"),
    [
        *((ppo_module, ppo, name) for name in ("moved_at_the_start", "sampler_disagrees", "score_is_elsewhere")),
        *((grpo_module, grpo, name) for name in ("moved_at_the_start", "sampler_disagrees")),
    ],
)
def test_a_complaint_halts_the_run_and_leaves_the_batch(
    module: Any, make: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, lambda *_: f"{name} spoke up")
    with pytest.raises(TrainingHalted, match=f"round 0: {name} spoke up; batch in") as halted:
        make(tmp_path).round()
    path = Path(str(halted.value).rpartition("batch in ")[2])
    assert path.is_file()
