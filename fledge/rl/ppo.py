"""Proximal policy optimisation on language, with InstructGPT's details: one `PPO.round()` is one iteration.

    sample -> judge (scores, log-probabilities, values) -> rewards -> advantages -> epochs of minibatches -> beta, EMA

Every step of the optimizer may take in pretraining rows beside the episodes (PPO-ptx): both gradients accumulate
before it. Each term is a mean over its own tokens, `pretrain_weight` (the paper's gamma) multiplies the second.

Source: Schulman et al. 2017 (1707.06347); Ouyang et al. 2022 (2203.02155), section 3.5, appendix C.4; Huang et al. 2024
(2403.17031). Suffixes: B episodes, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from fledge.batches import Rollout, TokenBatch
from fledge.objectives.clipped_policy import ActionSpace, ClippedPolicy
from fledge.objectives.clipped_value import ClippedValue
from fledge.rl.actors import Actors
from fledge.rl.advantage import gae, whiten
from fledge.rl.checks import moved_at_the_start, sampler_disagrees, score_is_elsewhere
from fledge.rl.ema import Ema
from fledge.rl.kl import KLConfig, next_beta
from fledge.rl.one_pass import OnePass, Said, policy_said, value_said
from fledge.rl.prompts import draw_prompts, generator_of
from fledge.rl.report import round_metrics, update_metrics
from fledge.rl.reward import Moments, RewardConfig, shape_scores, token_rewards
from fledge.rl.rollout import Episodes, policy_logprobs, state_values
from fledge.rl.saving import flat, group_of, load_trainable, trainable
from fledge.rl.world import (
    MIN_MINIBATCH,
    RATIO_TOLERANCE,
    PretrainMix,
    Round,
    World,
    dump_path,
    failed_rewards,
    halt,
    pretraining_pairs,
    require_alike,
    require_shares,
    sample,
    sampler_correction,
    shared_figures,
    together,
)
from fledge.train.device import precision
from fledge.train.loop import Objective, Pairs, train_step
from fledge.train.optim import OptimConfig, OptimizerSet
from fledge.train.schedule import Schedule
from fledge.types import Completion, Metrics

__all__ = ["PPO", "PPOConfig", "PretrainMix", "Round", "World"]


@dataclass(frozen=True)
class PPOConfig:
    """`rounds` of `episodes`; each round takes `epochs` passes over its episodes in minibatches.

    `forward_rows` is the most rows in one forward pass (memory, not mathematics), and `lanes` is how many such passes
    may train side by side on a CPU (train/lanes.py). `sampler_cap` corrects what the sampler's probabilities differ
    from the trainer's by importance weights up to this (None: no correction). `pretrain_ratio` is the number of
    pretraining rows an episode (InstructGPT: 8), `pretrain_weight` 0 leaves them out. Learning rates warm up over
    `warmup_rounds`, then stay ("constant") or fall to 0 ("linear").
    """

    rounds: int = 20
    episodes: int = 64
    minibatch: int = 64
    epochs: int = 1
    forward_rows: int = 64
    lanes: int = 1
    prompt_length: int = 64
    response_length: int = 48
    temperature: float = 1.0
    clip: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    sampler_cap: float | None = None
    kl: KLConfig = field(default_factory=KLConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    pretrain_weight: float = 1.0
    pretrain_ratio: float = 1.0
    policy_optim: OptimConfig = field(default_factory=lambda: OptimConfig.adamw(3e-4, decay=0.0, eps=1e-5))
    value_optim: OptimConfig = field(default_factory=lambda: OptimConfig.adamw(3e-4, decay=0.0, eps=1e-5))
    schedule: Literal["constant", "linear"] = "constant"
    warmup_rounds: int = 10
    clip_norm: float | None = 1.0
    ema_decay: float = 0.992
    seed: int = 0

    def __post_init__(self) -> None:
        checks: Sequence[tuple[bool, str]] = (
            (self.rounds >= 1 and self.epochs >= 1, "rounds and epochs must be at least 1"),
            (self.minibatch >= MIN_MINIBATCH, f"minibatch must be at least {MIN_MINIBATCH} episodes"),
            (
                self.episodes >= 1 and self.episodes % max(1, self.minibatch) == 0,
                f"minibatch {self.minibatch} must divide episodes {self.episodes}",
            ),
            (self.forward_rows >= 1 and self.lanes >= 1, "forward_rows and lanes must be at least 1"),
            (0 <= self.gamma <= 1 and 0 <= self.lam <= 1, "gamma and lam must lie between 0 and 1"),
            (self.sampler_cap is None or self.sampler_cap >= 1, "sampler_cap must be at least 1"),
            (self.pretrain_weight >= 0, "pretrain_weight must be 0 or more"),
            (self.pretrain_weight == 0 or self.pretrain_rows >= 1, "pretrain_ratio gives no row a minibatch"),
            (0 <= self.warmup_rounds <= self.rounds, f"warmup_rounds must lie between 0 and rounds {self.rounds}"),
        )
        for holds, complaint in checks:
            if not holds:
                raise ValueError(complaint)

    @property
    def pretrain_rows(self) -> int:
        """Pretraining rows beside each minibatch."""
        return round(self.pretrain_ratio * self.minibatch)

    def rows_a_pass(self, rows: int) -> int:
        """How many of a step's `rows` a training pass takes, so that every lane has one."""
        return min(self.forward_rows, max(1, -(-rows // self.lanes)))

    @property
    def steps_per_round(self) -> int:
        return self.epochs * (self.episodes // self.minibatch)


class PPO:
    """The state of a PPO run; `round()` advances it. `tensors`, `scalars` and `load` save and restore it to the bit."""

    def __init__(self, config: PPOConfig, actors: Actors, world: World) -> None:
        if config.pretrain_weight > 0 and world.pretrain is None:
            raise ValueError("pretrain_weight is above 0 but there are no pretraining rows; set it to 0")
        require_shares(world.ranks, episodes=config.episodes, minibatch=config.minibatch)
        require_alike(world.ranks, actors.policy, actors.value)
        self.config, self.actors, self.world = config, actors, world
        self.shape = world.shape(config.prompt_length, config.response_length)
        # The sampler never draws padding, so the trainer's distribution must not contain it either.
        self.space = ActionSpace(config.response_length, config.temperature, (world.pad_id,))
        self.policy_optimizers = OptimizerSet(actors.policy, config.policy_optim)
        self.value_optimizers = OptimizerSet(actors.value, config.value_optim)
        self.schedule = Schedule(config.schedule, config.rounds, config.warmup_rounds)
        self.ema = Ema(actors.policy, config.ema_decay)
        self.device = next(actors.policy.parameters()).device
        self.round_number = 0
        self.beta = config.kl.beta
        self.moments = Moments()

    def round(self) -> Round:
        """One iteration. TrainingHalted, with the batch in `dump_folder`, if a number is not one or ratios are off."""
        self.actors.quiet()
        prompts, completions, episodes = self._sample()
        held = self._held(episodes)
        opinions = self._opinions(episodes, *held)
        prompts, completions, episodes = together(self.world, prompts, completions, episodes)
        rollout, metrics = self._judge(episodes, *opinions)
        scale = self.schedule.scale(self.round_number)
        metrics |= {"round": float(self.round_number), "beta": self.beta, "lr_scale": scale}
        metrics |= self._update(rollout, scale, *held)
        self.beta = next_beta(self.beta, self.config.kl, kl=metrics["kl"], num_episodes=len(prompts))
        self.ema.update(self.actors.policy)
        self.round_number += 1
        return Round(metrics, prompts, completions, rollout)

    def _sample(self) -> tuple[list[Sequence[int]], list[Completion], Episodes]:
        """This process's share of the round's episodes, drawn with noise of its own (C24)."""
        config, ranks = self.config, self.world.ranks
        chosen = draw_prompts(
            len(self.world.prompts),
            config.episodes // ranks.count,
            seed=config.seed,
            number=self.round_number,
            rank=ranks.number,
            num_ranks=ranks.count,
        )
        prompts = [self.world.prompts[index] for index in chosen]
        generator = generator_of("sampling", config.seed, self.round_number, ranks.number)
        completions, episodes = sample(
            self.world, self.actors.policy, prompts, self.shape, temperature=config.temperature, generator=generator
        )
        return prompts, completions, episodes

    def _held(self, episodes: Episodes) -> tuple[Said | None, Said | None]:
        """The passes of policy and value function over the episodes, where a round has one step and that step one
        pass; else None. The value function's only where `forward_rows` has room for both: they are held together."""
        config, regions = self.config, self.world.regions
        is_one_pass = config.steps_per_round == 1 and config.episodes <= config.rows_a_pass(config.episodes)
        if not is_one_pass or self.world.ranks.count > 1:
            return None, None
        with precision(self.device):
            policy = value = None
            if regions.policy is None:
                policy = policy_said(self.actors.policy, episodes, self.space, self.round_number)
            if regions.scores is None and 2 * config.episodes <= config.forward_rows:
                value = value_said(self.actors.value, episodes)
        return policy, value

    def _opinions(
        self, episodes: Episodes, policy: Said | None, value: Said | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What policy, reference, value function and scorer say about this process's episodes, and after that what
        they say about the other processes': (old_BT, reference_BT, values_BT, scores_B) of the whole round."""
        config, actors, regions = self.config, self.actors, self.world.regions
        rows = min(config.forward_rows, config.minibatch)
        with precision(self.device):
            if policy is not None:
                old_BT = policy.of_actions(episodes)
            else:
                old_BT = policy_logprobs(actors.policy, episodes, self.space, rows=rows, region=regions.policy)
            reference_BT = policy_logprobs(actors.reference, episodes, self.space, rows=rows, region=regions.policy)
            if value is not None:
                values_BT = value.of_actions(episodes)
            else:
                values_BT = state_values(actors.value, episodes, rows=rows, region=regions.scores)
            scores_B = self.world.scorer(episodes).float()
        gathered = self.world.ranks.gathered
        return gathered(old_BT), gathered(reference_BT), gathered(values_BT), gathered(scores_B)

    def _judge(
        self, episodes: Episodes, old_BT: Tensor, reference_BT: Tensor, values_BT: Tensor, scores_B: Tensor
    ) -> tuple[Rollout, Metrics]:
        """From what all models say about the round's episodes, its rewards, advantages and returns."""
        config = self.config
        is_paid_B = ~failed_rewards(scores_B)
        self.moments = self.moments.with_scores(scores_B[is_paid_B])
        shaped_B = shape_scores(scores_B, episodes.ended_B, config.reward, self.moments)
        # An episode whose reward could not be had teaches nothing: none of its tokens is an action any more.
        shaped_B, mask_BT = torch.where(is_paid_B, shaped_B, 0.0), episodes.action_mask_BT * is_paid_B[:, None]
        rewards_BT = token_rewards(
            old_BT - reference_BT, shaped_B, mask_BT, beta=self.beta, whiten_rewards=config.reward.whiten
        )
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=config.gamma, lam=config.lam)
        if config.whiten_advantages:
            advantages_BT = whiten(advantages_BT, mask_BT, shift_mean=True)
        # No weight is negative, so an action's loss is weighed with its advantage, whichever bound holds.
        advantages_BT = advantages_BT * sampler_correction(old_BT, episodes, config.sampler_cap)
        rollout = Rollout(
            tokens_BT=episodes.tokens_BT,
            segments_BT=episodes.segments_BT,
            action_mask_BT=mask_BT,
            old_logprobs_BT=old_BT,
            reference_logprobs_BT=reference_BT,
            old_values_BT=values_BT,
            rewards_BT=rewards_BT,
            advantages_BT=advantages_BT,
            returns_BT=returns_BT,
            scores_B=scores_B,
            sampler_logprobs_BT=episodes.sampler_logprobs_BT,
            policy_version=self.round_number,
        )
        if not is_paid_B.any() or not torch.isfinite(scores_B[is_paid_B]).all():
            self._halt("a score is not a finite number, or no episode has one", rollout)
        # Where its weights are corrected for another sampler, that the two differ is known.
        if config.sampler_cap is None and (complaint := sampler_disagrees(rollout)):
            self._halt(complaint, rollout)
        if not config.reward.whiten and (complaint := score_is_elsewhere(rollout, shaped_B, self.beta)):
            self._halt(complaint, rollout)
        figures = round_metrics(rollout.rows(is_paid_B), episodes.ended_B[is_paid_B], shaped_B[is_paid_B])
        figures["failed_rewards"] = float((~is_paid_B).float().mean())
        return rollout, figures | shared_figures(self.world)

    def _update(self, rollout: Rollout, scale: float, policy: Said | None, value: Said | None) -> Metrics:
        """Epochs of minibatches: every episode once an epoch, in an order of its own."""
        config = self.config
        self.policy_optimizers.set_scale(scale)
        self.value_optimizers.set_scale(scale)
        seen: list[Metrics] = []
        for epoch in range(config.epochs):
            shuffler = generator_of("minibatches", config.seed, self.round_number * config.epochs + epoch)
            order = torch.randperm(config.episodes, generator=shuffler).to(self.device)
            for chosen in order.split(config.minibatch):
                held = policy and policy.rows(chosen), value and value.rows(chosen)
                seen.append(self._step(rollout.rows(chosen), len(seen), *held))
        return update_metrics(seen)

    def _step(self, minibatch: Rollout, index: int, policy: Said | None, value: Said | None) -> Metrics:
        """One optimizer step of policy and of value function on a minibatch, the `index`-th of its round, of which this
        process takes its share; `policy` and `value` are what they said of it."""
        config, regions = self.config, self.world.regions
        clipped_policy = ClippedPolicy(self.space, config.clip, config.dual_clip, regions.policy)
        clipped_value = ClippedValue(config.value_clip, regions.scores)
        of_policy = clipped_policy if policy is None else OnePass(clipped_policy, policy)
        of_value = clipped_value if value is None else OnePass(clipped_value, value)
        own = self.world.ranks.own(config.minibatch).to(self.device)
        parts = [minibatch.rows(chosen) for chosen in own.split(config.rows_a_pass(len(own)))]
        pairs: Pairs = [*((of_policy, part) for part in parts), *self._pretraining(index)]
        metrics = train_step(
            self.actors.policy,
            self.policy_optimizers,
            pairs,
            clip_norm=config.clip_norm,
            dump_to=self._dump_path("policy"),
            lanes=config.lanes,
            ranks=self.world.ranks,
        )
        metrics = metrics if policy is None else policy.with_gap(metrics)
        # Nothing has been learned before a round's first step: sampler, trainer and mask agree, or this is a bug.
        tolerance = RATIO_TOLERANCE[self.device.type]
        gap = metrics.get("ratio_gap", 0.0)  # a minibatch whose rewards all failed has no action
        if index == 0 and not gap <= tolerance:
            self._halt(f"ratio {gap:.2e} away from 1 before any step", minibatch)
        if index == 0 == self.round_number and (complaint := moved_at_the_start(minibatch, tolerance)):
            self._halt(complaint, minibatch)
        value_metrics = train_step(
            self.actors.value,
            self.value_optimizers,
            [(of_value, part) for part in parts],
            clip_norm=config.clip_norm,
            dump_to=self._dump_path("value"),
            lanes=config.lanes,
            ranks=self.world.ranks,
        )
        value_metrics["value_grad_norm"] = value_metrics.pop("grad_norm")
        return {**value_metrics, **metrics}

    def _pretraining(self, index: int) -> list[tuple[Objective, TokenBatch]]:
        config = self.config
        step = self.round_number * config.steps_per_round + index
        return pretraining_pairs(
            self.world,
            config.pretrain_weight,
            step=step,
            rows=config.pretrain_rows,
            forward_rows=config.rows_a_pass(config.pretrain_rows),
        )

    def _dump_path(self, name: str) -> Path | None:
        return dump_path(self.world, self.round_number, name)

    def _halt(self, why: str, batch: Rollout) -> NoReturn:
        halt(self.world, self.round_number, why, batch, self.space)

    def tensors(self) -> dict[str, Tensor]:
        """All trained weights, their averages and optimizer states, flat by name; not copies."""
        groups = {
            "policy": trainable(self.actors.policy),
            "value": trainable(self.actors.value),
            "ema": self.ema.state(),
            "policy_optimizer": self.policy_optimizers.tensors(),
            "value_optimizer": self.value_optimizers.tensors(),
        }
        return flat(groups)

    def scalars(self) -> dict[str, Any]:
        """What `tensors` cannot hold, as JSON values. `round` is also the prompt cursor and the state of all draws."""
        return {"round": self.round_number, "beta": self.beta, "moments": self.moments.to_json()}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Go on where another PPO of the same config and world stood. CheckpointError if the weights do not fit."""
        load_trainable(self.actors.policy, group_of(tensors, "policy"))
        load_trainable(self.actors.value, group_of(tensors, "value"))
        self.ema.load(group_of(tensors, "ema"))
        self.policy_optimizers.load_tensors(group_of(tensors, "policy_optimizer"))
        self.value_optimizers.load_tensors(group_of(tensors, "value_optimizer"))
        self.round_number, self.beta = int(scalars["round"]), float(scalars["beta"])
        self.moments = Moments(**scalars["moments"])
