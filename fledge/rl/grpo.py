"""Policy optimisation without a value function: the answers to a prompt compete within their group.

    sample groups -> scores, log-probabilities -> advantages -> epochs of minibatches -> beta, EMA

One algorithm with the choices that its published relatives differ in; `GRPOConfig.grpo()`, `.dr_grpo()`, `.dapo()` and
`.rloo()` are those choices by name. Everything else (sampling, pretraining mix, checks, resuming) is as in ppo.py.

Source: see groups.py and objectives/group_policy.py. Suffixes: B episodes, K answers of a group, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from fledge.batches import GroupRollout
from fledge.objectives.clipped_policy import ActionSpace, check_clip
from fledge.objectives.group_policy import Estimator, GroupPolicy
from fledge.rl.actors import PolicyPair
from fledge.rl.checks import moved_at_the_start, sampler_disagrees
from fledge.rl.ema import Ema
from fledge.rl.gathering import Draw, Gathered, gather
from fledge.rl.groups import Baseline, Normalise, Scale, group_advantages, loss_weights, overlong_penalty
from fledge.rl.kl import KLConfig, next_beta
from fledge.rl.one_pass import OnePass, Said, policy_said
from fledge.rl.prompts import generator_of
from fledge.rl.report import group_metrics, update_metrics
from fledge.rl.reward import Moments, RewardConfig, shape_scores
from fledge.rl.rollout import Episodes, policy_logprobs
from fledge.rl.saving import flat, group_of, load_trainable, trainable
from fledge.rl.world import (
    MIN_MINIBATCH,
    RATIO_TOLERANCE,
    Round,
    World,
    dump_path,
    failed_rewards,
    halt,
    pretraining_pairs,
    require_alike,
    require_shares,
    sampler_correction,
    shared_figures,
    together,
)
from fledge.train.device import precision
from fledge.train.loop import Pairs, train_step
from fledge.train.optim import OptimConfig, OptimizerSet
from fledge.train.schedule import Schedule
from fledge.types import Metrics


@dataclass(frozen=True)
class GRPOConfig:
    """`rounds` of `prompts` prompts with `group` answers each, in minibatches of episodes, `epochs` times.

    `baseline`, `scale`, `normalise`: see groups.py. `kl_as` "loss" adds beta times `estimator` to the loss, "reward"
    subtracts beta times the answer's summed log-ratio from its score. `clip_high` None is as `clip`. `redraws` is how
    often a round draws further prompts in place of groups whose scores are all the same (DAPO's dynamic sampling; 0
    keeps them). `overlong_buffer` tokens before `response_length` a penalty begins (None: none). `sampler_cap` corrects
    what the sampler's probabilities differ from the trainer's by importance weights up to this (None: no correction).
    All else as in `PPOConfig`.
    """

    rounds: int = 20
    prompts: int = 8
    group: int = 8
    minibatch: int = 64
    epochs: int = 1
    forward_rows: int = 64
    prompt_length: int = 64
    response_length: int = 48
    temperature: float = 1.0
    baseline: Baseline = "mean"
    scale: Scale = "std"
    normalise: Normalise = "answer"
    clip: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    kl: KLConfig = field(default_factory=lambda: KLConfig(beta=0.04))  # Shao et al. 2024, section 4.2
    kl_as: Literal["loss", "reward"] = "loss"
    estimator: Estimator = "k2"
    redraws: int = 0
    overlong_buffer: int | None = None
    sampler_cap: float | None = None
    reward: RewardConfig = field(default_factory=lambda: RewardConfig(missing_end_score=None))
    pretrain_weight: float = 0.0
    pretrain_ratio: float = 1.0
    optim: OptimConfig = field(default_factory=lambda: OptimConfig.adamw(3e-4, decay=0.0, eps=1e-5))
    schedule: Literal["constant", "linear"] = "constant"
    warmup_rounds: int = 10
    clip_norm: float | None = 1.0
    ema_decay: float = 0.992
    seed: int = 0

    def __post_init__(self) -> None:
        check_clip(self.clip, self.clip_high, self.dual_clip)
        buffer, cap = self.overlong_buffer, self.sampler_cap
        checks: Sequence[tuple[bool, str]] = (
            (self.rounds >= 1 and self.epochs >= 1 and self.prompts >= 1, "rounds, epochs, prompts: at least 1"),
            (self.group >= 2, "a group needs at least 2 answers, one alone has nothing to compete with"),
            (self.minibatch >= MIN_MINIBATCH, f"minibatch must be at least {MIN_MINIBATCH} episodes"),
            (
                self.episodes % max(1, self.minibatch) == 0,
                f"minibatch {self.minibatch} must divide prompts x group, {self.prompts} x {self.group}",
            ),
            (self.forward_rows >= 1 and self.redraws >= 0, "forward_rows must be at least 1, redraws at least 0"),
            (buffer is None or 1 <= buffer <= self.response_length, "overlong_buffer must be 1 to response_length"),
            (cap is None or cap >= 1, "sampler_cap must be at least 1"),
            (not self.reward.whiten, "reward.whiten is for token rewards; groups have none, set it to false"),
            (self.pretrain_weight >= 0, "pretrain_weight must be 0 or more"),
            (self.pretrain_weight == 0 or self.pretrain_rows >= 1, "pretrain_ratio gives no row a minibatch"),
            (0 <= self.warmup_rounds <= self.rounds, f"warmup_rounds must lie between 0 and rounds {self.rounds}"),
        )
        for holds, complaint in checks:
            if not holds:
                raise ValueError(complaint)

    @property
    def episodes(self) -> int:
        """Episodes a round."""
        return self.prompts * self.group

    def draw(self, num_ranks: int = 1) -> Draw:
        """What each of so many processes draws."""
        return Draw(self.prompts // num_ranks, self.group, self.redraws, self.temperature, self.seed)

    @property
    def pretrain_rows(self) -> int:
        """Pretraining rows beside each minibatch."""
        return round(self.pretrain_ratio * self.minibatch)

    @property
    def steps_per_round(self) -> int:
        return self.epochs * (self.episodes // self.minibatch)

    @classmethod
    def grpo(cls) -> GRPOConfig:
        """Shao et al. 2024 as published: k3 in the loss."""
        return cls(estimator="k3")

    @classmethod
    def dr_grpo(cls) -> GRPOConfig:
        """Liu et al. 2025: no division by the spread or by an answer's length, no KL term."""
        return cls(scale="none", normalise="limit", kl=KLConfig(beta=0.0))

    @classmethod
    def dapo(cls) -> GRPOConfig:
        """Yu et al. 2025: clip-higher, mean over tokens, dynamic sampling, overlong penalty, no KL term."""
        return cls(normalise="token", clip_high=0.28, redraws=4, overlong_buffer=8, kl=KLConfig(beta=0.0))

    @classmethod
    def rloo(cls) -> GRPOConfig:
        """Ahmadian et al. 2024: REINFORCE with the other answers as baseline, KL in the reward."""
        return cls(baseline="leave_one_out", scale="none", normalise="sum", kl=KLConfig(beta=0.03), kl_as="reward")


class GRPO:
    """The state of a run; `round()` advances it. `tensors`, `scalars` and `load` save and restore it to the bit."""

    def __init__(self, config: GRPOConfig, pair: PolicyPair, world: World) -> None:
        if config.pretrain_weight > 0 and world.pretrain is None:
            raise ValueError("pretrain_weight is above 0 but there are no pretraining rows; set it to 0")
        require_shares(world.ranks, prompts=config.prompts, minibatch=config.minibatch)
        require_alike(world.ranks, pair.policy)
        self.config, self.actors, self.world = config, pair, world
        self.shape = world.shape(config.prompt_length, config.response_length)
        # The sampler never draws padding, so the trainer's distribution must not contain it either.
        self.space = ActionSpace(config.response_length, config.temperature, (world.pad_id,))
        self.optimizers = OptimizerSet(pair.policy, config.optim)
        self.schedule = Schedule(config.schedule, config.rounds, config.warmup_rounds)
        self.ema = Ema(pair.policy, config.ema_decay)
        self.device = next(pair.policy.parameters()).device
        self.round_number = 0
        self.num_draws = 0  # how often prompts were drawn: the prompt cursor
        self.beta = config.kl.beta
        self.moments = Moments()

    def round(self) -> Round:
        """One iteration. TrainingHalted, with the batch in `dump_folder`, if a number is not one or ratios are off."""
        self.actors.quiet()
        draw = self.config.draw(self.world.ranks.count)
        gathered, self.num_draws = gather(draw, self.world, self.actors.policy, self.shape, self.num_draws)
        held = self._held(gathered.episodes)
        opinions = self._opinions(gathered, held)
        said = together(self.world, gathered.prompts, gathered.completions, gathered.episodes)
        rollout, metrics = self._judge(Gathered(*said, opinions[2], gathered.redraws), *opinions[:2])
        scale = self.schedule.scale(self.round_number)
        metrics |= {"round": float(self.round_number), "beta": self.beta, "lr_scale": scale}
        metrics |= self._update(rollout, scale, held)
        self.beta = next_beta(self.beta, self.config.kl, kl=metrics["kl"], num_episodes=self.config.episodes)
        self.ema.update(self.actors.policy)
        self.round_number += 1
        return Round(metrics, said[0], said[1], rollout)

    def _held(self, episodes: Episodes) -> Said | None:
        """The policy's pass over the episodes, where a round has one step and that step one pass; else None."""
        config = self.config
        is_one_pass = config.steps_per_round == 1 and config.episodes <= config.forward_rows
        if not is_one_pass or self.world.ranks.count > 1 or self.world.regions.policy is not None:
            return None
        with precision(self.device):
            return policy_said(self.actors.policy, episodes, self.space, self.round_number)

    def _opinions(self, gathered: Gathered, held: Said | None) -> tuple[Tensor, Tensor, Tensor]:
        """What policy, reference and scorer say about this process's episodes, and after that what they say about the
        other processes': (old_BT, reference_BT, scores_B) of the whole round."""
        actors, episodes, region = self.actors, gathered.episodes, self.world.regions.policy
        rows = min(self.config.forward_rows, self.config.minibatch)
        with precision(self.device):
            if held is not None:
                old_BT = held.of_actions(episodes)
            else:
                old_BT = policy_logprobs(actors.policy, episodes, self.space, rows=rows, region=region)
            reference_BT = policy_logprobs(actors.reference, episodes, self.space, rows=rows, region=region)
        ranks = self.world.ranks
        return ranks.gathered(old_BT), ranks.gathered(reference_BT), ranks.gathered(gathered.scores_B)

    def _judge(self, gathered: Gathered, old_BT: Tensor, reference_BT: Tensor) -> tuple[GroupRollout, Metrics]:
        """How each of the round's episodes did beside its group."""
        config, episodes, scores_B = self.config, gathered.episodes, gathered.scores_B
        is_paid_B = ~failed_rewards(scores_B)
        self.moments = self.moments.with_scores(scores_B[is_paid_B])
        shaped_B = self._shape(episodes, scores_B)
        paid_B = shaped_B - self.beta * (old_BT - reference_BT).sum(dim=1) if config.kl_as == "reward" else shaped_B
        advantages_B = group_advantages(paid_B, config.group, baseline=config.baseline, scale=config.scale)
        # An episode whose reward could not be had teaches nothing: none of its tokens is an action any more.
        mask_BT = episodes.action_mask_BT * is_paid_B[:, None]
        weights_BT, shares_B = loss_weights(mask_BT, config.normalise, config.response_length)
        zero_BT = torch.zeros_like(old_BT)
        rollout = GroupRollout(
            tokens_BT=episodes.tokens_BT,
            segments_BT=episodes.segments_BT,
            action_mask_BT=mask_BT,
            old_logprobs_BT=old_BT,
            reference_logprobs_BT=reference_BT,
            old_values_BT=zero_BT,
            rewards_BT=zero_BT,
            advantages_BT=advantages_B[:, None] * mask_BT,
            returns_BT=zero_BT,
            scores_B=scores_B,
            sampler_logprobs_BT=episodes.sampler_logprobs_BT,
            policy_version=self.round_number,
            group_B=torch.arange(config.episodes, device=self.device) // config.group,
            weights_BT=weights_BT * sampler_correction(old_BT, episodes, config.sampler_cap),
            shares_B=shares_B,
        )
        if not is_paid_B.any() or not torch.isfinite(scores_B[is_paid_B]).all():
            self._halt("a score is not a finite number, or no episode has one", rollout)
        # Where its weights are corrected for another sampler, that the two differ is known.
        if config.sampler_cap is None and (complaint := sampler_disagrees(rollout)):
            self._halt(complaint, rollout)
        figures = group_metrics(rollout, episodes.ended_B, shaped_B, config.group)
        return rollout, figures | {"redraws": float(gathered.redraws)} | shared_figures(self.world)

    def _shape(self, episodes: Episodes, scores_B: Tensor) -> Tensor:
        """Scores as the policy is paid for them, NaN where there is none."""
        config = self.config
        shaped_B = shape_scores(scores_B, episodes.ended_B, config.reward, self.moments)
        if config.overlong_buffer is not None:
            length_B = episodes.action_mask_BT.sum(dim=1)
            shaped_B = shaped_B + overlong_penalty(
                length_B, limit=config.response_length, buffer=config.overlong_buffer
            )
        return torch.where(failed_rewards(scores_B), torch.nan, shaped_B)

    def _update(self, rollout: GroupRollout, scale: float, held: Said | None) -> Metrics:
        """Epochs of minibatches: every episode once an epoch, in an order of its own."""
        config = self.config
        self.optimizers.set_scale(scale)
        seen: list[Metrics] = []
        for epoch in range(config.epochs):
            shuffler = generator_of("minibatches", config.seed, self.round_number * config.epochs + epoch)
            order = torch.randperm(config.episodes, generator=shuffler).to(self.device)
            for chosen in order.split(config.minibatch):
                seen.append(self._step(rollout.rows(chosen), len(seen), held and held.rows(chosen)))
        return update_metrics(seen)

    def _step(self, minibatch: GroupRollout, index: int, held: Said | None) -> Metrics:
        """One optimizer step on a minibatch, the `index`-th of its round, of which this process takes its share;
        `held` is what the policy said of it."""
        config = self.config
        policy = GroupPolicy(
            self.space,
            config.clip,
            config.clip_high,
            config.dual_clip,
            beta=self.beta if config.kl_as == "loss" else 0.0,
            estimator=config.estimator,
            region=self.world.regions.policy,
        )
        ranks = self.world.ranks
        own = ranks.own(config.minibatch).to(self.device)
        parts = [minibatch.rows(chosen) for chosen in own.split(config.forward_rows)]
        mixed = pretraining_pairs(
            self.world,
            config.pretrain_weight,
            step=self.round_number * config.steps_per_round + index,
            rows=config.pretrain_rows,
            forward_rows=config.forward_rows,
        )
        objective = policy if held is None else OnePass(policy, held)
        pairs: Pairs = [*((objective, part) for part in parts), *mixed]
        dump = dump_path(self.world, self.round_number, "policy")
        metrics = train_step(
            self.actors.policy, self.optimizers, pairs, clip_norm=config.clip_norm, dump_to=dump, ranks=ranks
        )
        metrics = metrics if held is None else held.with_gap(metrics)
        tolerance = RATIO_TOLERANCE[self.device.type]
        gap = metrics.get("ratio_gap", 0.0)  # a minibatch whose rewards all failed has no action
        if index == 0 and not gap <= tolerance:
            self._halt(f"ratio {gap:.2e} away from 1 before any step", minibatch)
        if index == 0 == self.round_number and (complaint := moved_at_the_start(minibatch, tolerance)):
            self._halt(complaint, minibatch)
        return metrics

    def _halt(self, why: str, batch: GroupRollout) -> NoReturn:
        halt(self.world, self.round_number, why, batch, self.space)

    def tensors(self) -> dict[str, Tensor]:
        """All trained weights, their averages and optimizer states, flat by name; not copies."""
        policy = trainable(self.actors.policy)
        return flat({"policy": policy, "ema": self.ema.state(), "policy_optimizer": self.optimizers.tensors()})

    def scalars(self) -> dict[str, Any]:
        """What `tensors` cannot hold, as JSON values."""
        moments = self.moments.to_json()
        return {"round": self.round_number, "draws": self.num_draws, "beta": self.beta, "moments": moments}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Go on where another run of the same config and world stood. CheckpointError if the weights do not fit."""
        load_trainable(self.actors.policy, group_of(tensors, "policy"))
        self.ema.load(group_of(tensors, "ema"))
        self.optimizers.load_tensors(group_of(tensors, "policy_optimizer"))
        self.round_number, self.num_draws = int(scalars["round"]), int(scalars["draws"])
        self.beta, self.moments = float(scalars["beta"]), Moments(**scalars["moments"])
