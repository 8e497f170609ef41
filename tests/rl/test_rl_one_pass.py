"""A round of one step makes one pass: it learns what two passes would have learned, and noise is still noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import rl_toy as toy
import torch

from fledge.errors import TrainingHalted
from fledge.models.llama import Llama
from fledge.rl import one_pass
from fledge.rl.actors import PolicyPair
from fledge.rl.grpo import GRPO, GRPOConfig
from fledge.rl.ppo import PPO, PPOConfig
from fledge.rl.rollout import Episodes
from fledge.train.optim import OptimConfig

OPTIM = OptimConfig.adamw(1e-3, decay=0.0, eps=1e-5)
SHAPE = {"rounds": 3, "minibatch": 16, "prompt_length": toy.PROMPT, "response_length": toy.RESPONSE, "warmup_rounds": 0}
GROUPS = replace(GRPOConfig.grpo(), prompts=4, group=4, optim=OPTIM, **SHAPE)
PPO_CONFIG = PPOConfig(
    episodes=16, pretrain_weight=0.0, policy_optim=OPTIM, value_optim=OPTIM, forward_rows=32, **SHAPE
)


def grpo(config: GRPOConfig = GROUPS) -> GRPO:
    return GRPO(config, PolicyPair.start(toy.language_model()), toy.world())


def passes_with_gradient(run: GRPO | PPO, monkeypatch) -> int:
    """How many rows of the policy's and the value function's passes keep a graph in one round, in rounds of 16."""
    seen = []
    hidden = Llama.hidden

    def counting(self, x, context):
        if torch.is_grad_enabled():
            seen.append(len(x))
        return hidden(self, x, context)

    with monkeypatch.context() as patched:
        patched.setattr(Llama, "hidden", counting)
        run.round()
    return sum(seen)


@pytest.mark.parametrize("make", [grpo, lambda: grpo(replace(GROUPS, kl_as="reward")), lambda: toy.ppo(PPO_CONFIG)])
def test_one_pass_learns_what_two_passes_learn(make, monkeypatch):
    alone = make()
    with monkeypatch.context() as patched:
        patched.setattr(type(alone), "_held", lambda self, episodes: (None, None) if isinstance(self, PPO) else None)
        twice = make()
        expected = [twice.round().metrics for _ in range(3)]
    found = [alone.round().metrics for _ in range(3)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, abs=2e-5, rel=1e-4)
    for name, weight in alone.tensors().items():
        assert torch.allclose(weight, twice.tensors()[name], atol=2e-5), name


def test_every_episode_is_passed_once_with_its_graph(monkeypatch):
    assert passes_with_gradient(grpo(), monkeypatch) == 16
    assert passes_with_gradient(toy.ppo(PPO_CONFIG), monkeypatch) == 2 * 16


@pytest.mark.parametrize("rows", [8, 16])
def test_what_does_not_fit_one_pass_is_not_held(rows):
    episodes = episodes_of(16)
    assert toy.ppo(replace(PPO_CONFIG, forward_rows=rows))._held(episodes)[1] is None
    assert (toy.ppo(replace(PPO_CONFIG, forward_rows=rows))._held(episodes)[0] is None) == (rows == 8)
    assert grpo(replace(GROUPS, forward_rows=8))._held(episodes) is None
    assert grpo(replace(GROUPS, minibatch=8))._held(episodes) is None
    assert grpo(replace(GROUPS, epochs=2))._held(episodes) is None


def episodes_of(number: int) -> Episodes:
    run = grpo(replace(GROUPS, prompts=number // 4))
    rollout = run.round().rollout
    told = (rollout.tokens_BT, rollout.segments_BT, rollout.action_mask_BT, rollout.sampler_logprobs_BT)
    return Episodes(*told, torch.ones(number, dtype=torch.bool))


@pytest.mark.parametrize("make", [grpo, lambda: toy.ppo(PPO_CONFIG)])
def test_c36_noise_between_the_two_passes_over_an_episode_aborts(make, monkeypatch):
    told = one_pass.policy_logprobs
    generator = torch.Generator().manual_seed(0)

    def noisy(*args, **options):
        logprobs = told(*args, **options)
        return logprobs + 1e-3 * torch.randn(logprobs.shape, generator=generator)

    run = make()
    assert run.round().metrics["ratio_gap"] <= 1e-5
    monkeypatch.setattr(one_pass, "policy_logprobs", noisy)
    with pytest.raises(TrainingHalted, match="away from 1 before any step"):
        run.round()


def test_c36_in_rounds_that_follow_each_other_every_episode_is_asked_twice(monkeypatch):
    asked, told = [], one_pass.policy_logprobs

    def seeing(model, episodes, space, *, rows):
        asked.append(episodes.tokens_BT)
        return told(model, episodes, space, rows=rows)

    monkeypatch.setattr(one_pass, "policy_logprobs", seeing)
    run, episodes = grpo(), episodes_of(16)
    asked.clear()
    for number in range(2):
        one_pass.policy_said(run.actors.policy, episodes, run.space, number)
    assert [len(tokens) for tokens in asked] == [one_pass.NUM_ASKED_TWICE] * 2
    both = torch.stack(asked, dim=1).flatten(0, 1)
    assert torch.equal(both, episodes.tokens_BT)
