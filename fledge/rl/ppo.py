"""Proximal policy optimisation on language, with InstructGPT's details: one `PPO.round()` is one iteration.

    sample -> judge (scores, log-probabilities, values) -> rewards -> advantages -> epochs of minibatches -> beta, EMA

Every step of the optimizer may take in pretraining rows beside the episodes (PPO-ptx): both gradients accumulate
before it. Each term is a mean over its own tokens, `pretrain_weight` (the paper's gamma) multiplies the second.

Source: Schulman et al. 2017 (1707.06347); Ouyang et al. 2022 (2203.02155), section 3.5, appendix C.4; Huang et al. 2024
(2403.17031). Suffixes: B episodes, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from fledge.batches import Loss, Rollout, TokenBatch
from fledge.errors import CheckpointError, TrainingHalted
from fledge.objectives.clipped_policy import ActionSpace, ClippedPolicy
from fledge.objectives.clipped_value import ClippedValue
from fledge.rl.actors import Actors
from fledge.rl.advantage import gae, whiten
from fledge.rl.ema import Ema
from fledge.rl.kl import KLConfig, next_beta
from fledge.rl.prompts import draw_prompts, generator_of
from fledge.rl.report import round_metrics, update_metrics
from fledge.rl.reward import Moments, RewardConfig, shape_scores, token_rewards
from fledge.rl.rollout import (
    Episodes,
    EpisodeShape,
    Regions,
    Sampler,
    Scorer,
    lay_out,
    policy_logprobs,
    state_values,
)
from fledge.train.device import precision
from fledge.train.loop import Objective, Pairs, dump_batches, train_step
from fledge.train.optim import OptimConfig, OptimizerSet
from fledge.train.schedule import Schedule
from fledge.types import Completion, Metrics, SamplingParams

MIN_MINIBATCH = 8  # fewer episodes make a step's advantages noise
# How far a probability ratio may be from 1 before anything has been learned: rounding, by precision.
RATIO_TOLERANCE = {"cpu": 1e-5, "cuda": 1e-2}


@dataclass(frozen=True)
class PPOConfig:
    """`rounds` of `episodes`; each round takes `epochs` passes over its episodes in minibatches.

    `forward_rows` is the most rows in one forward pass (memory, not mathematics). `pretrain_ratio` is the number of
    pretraining rows an episode (InstructGPT: 8), `pretrain_weight` 0 leaves them out. Learning rates warm up over
    `warmup_rounds`, then stay ("constant") or fall to 0 ("linear").
    """

    rounds: int = 20
    episodes: int = 64
    minibatch: int = 64
    epochs: int = 1
    forward_rows: int = 64
    prompt_length: int = 64
    response_length: int = 48
    temperature: float = 1.0
    clip: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
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
            (self.episodes >= 1 and self.episodes % self.minibatch == 0, "minibatch must divide episodes"),
            (self.forward_rows >= 1, "forward_rows must be at least 1"),
            (0 <= self.gamma <= 1 and 0 <= self.lam <= 1, "gamma and lam must lie between 0 and 1"),
            (self.pretrain_weight >= 0, "pretrain_weight must be 0 or more"),
            (self.pretrain_weight == 0 or self.pretrain_rows >= 1, "pretrain_ratio gives no row a minibatch"),
            (0 <= self.warmup_rounds <= self.rounds, "warmup_rounds must lie between 0 and rounds"),
        )
        for holds, complaint in checks:
            if not holds:
                raise ValueError(f"{complaint}, got {self}")

    @property
    def pretrain_rows(self) -> int:
        """Pretraining rows beside each minibatch."""
        return round(self.pretrain_ratio * self.minibatch)

    @property
    def steps_per_round(self) -> int:
        return self.epochs * (self.episodes // self.minibatch)


@dataclass(frozen=True)
class PretrainMix:
    """`batch(step, rows)` gives the pretraining rows of optimizer step `step` and depends on nothing else."""

    objective: Objective
    batch: Callable[[int, int], TokenBatch]


@dataclass(frozen=True)
class World:
    """What the policy acts in. `prompts` are token ids; `pad_id`, `stop_ids` and `end_id` as in `EpisodeShape`."""

    prompts: Sequence[Sequence[int]]
    pad_id: int
    stop_ids: frozenset[int]
    end_id: int
    sampler: Sampler
    scorer: Scorer
    pretrain: PretrainMix | None = None
    regions: Regions = field(default_factory=Regions)
    dump_folder: Path | None = None


@dataclass(frozen=True)
class Round:
    """What one round did: its metrics (docs/metrics.md), what was said, and the tensors it learned from."""

    metrics: Metrics
    prompts: list[Sequence[int]]
    completions: list[Completion]
    rollout: Rollout


class PPO:
    """The state of a PPO run; `round()` advances it. `tensors`, `scalars` and `load` save and restore it to the bit."""

    def __init__(self, config: PPOConfig, actors: Actors, world: World) -> None:
        if config.pretrain_weight > 0 and world.pretrain is None:
            raise ValueError("pretrain_weight is above 0 but there are no pretraining rows; set it to 0")
        self.config, self.actors, self.world = config, actors, world
        self.shape = EpisodeShape(
            config.prompt_length, config.response_length, world.pad_id, world.stop_ids, world.end_id
        )
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
        rollout, metrics = self._judge(episodes)
        scale = self.schedule.scale(self.round_number)
        metrics |= {"round": float(self.round_number), "beta": self.beta, "lr_scale": scale}
        metrics |= self._update(rollout, scale)
        self.beta = next_beta(self.beta, self.config.kl, kl=metrics["kl"], num_episodes=len(prompts))
        self.ema.update(self.actors.policy)
        self.round_number += 1
        return Round(metrics, prompts, completions, rollout)

    def _sample(self) -> tuple[list[Sequence[int]], list[Completion], Episodes]:
        config = self.config
        chosen = draw_prompts(len(self.world.prompts), config.episodes, seed=config.seed, number=self.round_number)
        prompts = [self.world.prompts[index] for index in chosen]
        params = SamplingParams(max_tokens=config.response_length, temperature=config.temperature)
        generator = generator_of("sampling", config.seed, self.round_number)
        with precision(self.device):
            completions = self.world.sampler(self.actors.policy, prompts, params, generator)
        return prompts, completions, lay_out(prompts, completions, self.shape).to(self.device)

    def _judge(self, episodes: Episodes) -> tuple[Rollout, Metrics]:
        """What all models say about the episodes, and from it rewards, advantages and returns."""
        config, actors, regions = self.config, self.actors, self.world.regions
        rows = min(config.forward_rows, config.minibatch)
        with precision(self.device):
            old_BT = policy_logprobs(actors.policy, episodes, self.space, rows=rows, region=regions.policy)
            reference_BT = policy_logprobs(actors.reference, episodes, self.space, rows=rows, region=regions.policy)
            values_BT = state_values(actors.value, episodes, rows=rows, region=regions.scores)
            scores_B = self.world.scorer(episodes).float()
        self.moments = self.moments.with_scores(scores_B)
        shaped_B = shape_scores(scores_B, episodes.ended_B, config.reward, self.moments)
        mask_BT = episodes.action_mask_BT
        rewards_BT = token_rewards(
            old_BT - reference_BT, shaped_B, mask_BT, beta=self.beta, whiten_rewards=config.reward.whiten
        )
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=config.gamma, lam=config.lam)
        if config.whiten_advantages:
            advantages_BT = whiten(advantages_BT, mask_BT, shift_mean=True)
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
        if not bool(torch.isfinite(scores_B).all()):
            self._halt("a score is not a finite number", rollout)
        return rollout, round_metrics(rollout, episodes.ended_B, shaped_B)

    def _update(self, rollout: Rollout, scale: float) -> Metrics:
        """Epochs of minibatches: every episode once an epoch, in an order of its own."""
        config = self.config
        self.policy_optimizers.set_scale(scale)
        self.value_optimizers.set_scale(scale)
        seen: list[Metrics] = []
        for epoch in range(config.epochs):
            shuffler = generator_of("minibatches", config.seed, self.round_number * config.epochs + epoch)
            order = torch.randperm(config.episodes, generator=shuffler).to(self.device)
            for chosen in order.split(config.minibatch):
                seen.append(self._step(rollout.rows(chosen), len(seen)))
        return update_metrics(seen)

    def _step(self, minibatch: Rollout, index: int) -> Metrics:
        """One optimizer step of policy and of value function on a minibatch, the `index`-th of its round."""
        config, regions = self.config, self.world.regions
        policy = ClippedPolicy(self.space, config.clip, config.dual_clip, regions.policy)
        value = ClippedValue(config.value_clip, regions.scores)
        rows = torch.arange(config.minibatch, device=self.device).split(config.forward_rows)
        parts = [minibatch.rows(chosen) for chosen in rows]
        pairs: Pairs = [*((policy, part) for part in parts), *self._pretraining(index)]
        metrics = train_step(
            self.actors.policy,
            self.policy_optimizers,
            pairs,
            clip_norm=config.clip_norm,
            dump_to=self._dump_path("policy"),
        )
        # Nothing has been learned before a round's first step: sampler, trainer and mask agree, or this is a bug.
        tolerance = RATIO_TOLERANCE[self.device.type]
        # A mean of the parts' largest gaps times their number is at least the largest of all.
        if index == 0 and not metrics["ratio_gap"] * len(parts) <= tolerance:
            self._halt(f"ratio {metrics['ratio_gap']:.2e} away from 1 before any step", minibatch)
        value_metrics = train_step(
            self.actors.value,
            self.value_optimizers,
            [(value, part) for part in parts],
            clip_norm=config.clip_norm,
            dump_to=self._dump_path("value"),
        )
        value_metrics["value_grad_norm"] = value_metrics.pop("grad_norm")
        return {**value_metrics, **metrics}

    def _pretraining(self, index: int) -> list[tuple[Objective, TokenBatch]]:
        """The pretraining rows of a step, weighed, in pieces that fit a forward pass."""
        mix, weight = self.world.pretrain, self.config.pretrain_weight
        if mix is None or weight == 0:
            return []
        step = self.round_number * self.config.steps_per_round + index
        batch = mix.batch(step, self.config.pretrain_rows)
        objective = Weighted(mix.objective, weight)
        return [(objective, part) for part in split_rows(batch, self.config.forward_rows)]

    def _dump_path(self, name: str) -> Path | None:
        folder = self.world.dump_folder
        return None if folder is None else folder / f"halted-{self.round_number}-{name}.safetensors"

    def _halt(self, why: str, batch: Rollout) -> NoReturn:
        path = self._dump_path("rollout")
        if path is not None:
            dump_batches([(ClippedPolicy(self.space), batch)], path)
        raise TrainingHalted(f"PPO round {self.round_number}: {why}; batch in {path or 'nowhere (no dump_folder)'}")

    def tensors(self) -> dict[str, Tensor]:
        """All trained weights, their averages and optimizer states, flat by name; not copies."""
        groups = {
            "policy": _trainable(self.actors.policy),
            "value": _trainable(self.actors.value),
            "ema": self.ema.state(),
            "policy_optimizer": self.policy_optimizers.tensors(),
            "value_optimizer": self.value_optimizers.tensors(),
        }
        return {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}

    def scalars(self) -> dict[str, Any]:
        """What `tensors` cannot hold, as JSON values. `round` is also the prompt cursor and the state of all draws."""
        return {"round": self.round_number, "beta": self.beta, "moments": self.moments.to_json()}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Go on where another PPO of the same config and world stood. CheckpointError if the weights do not fit."""
        _load_trainable(self.actors.policy, group_of(tensors, "policy"))
        _load_trainable(self.actors.value, group_of(tensors, "value"))
        self.ema.load(group_of(tensors, "ema"))
        self.policy_optimizers.load_tensors(group_of(tensors, "policy_optimizer"))
        self.value_optimizers.load_tensors(group_of(tensors, "value_optimizer"))
        self.round_number, self.beta = int(scalars["round"]), float(scalars["beta"])
        self.moments = Moments(**scalars["moments"])


@dataclass(frozen=True)
class Weighted:
    """Another objective with every term's weight times `weight`."""

    objective: Objective
    weight: float

    def loss(self, model: Any, batch: Any) -> Loss:
        loss = self.objective.loss(model, batch)
        terms = {name: replace(term, weight=term.weight * self.weight) for name, term in loss.terms.items()}
        return replace(loss, terms=terms)


def split_rows(batch: TokenBatch, rows: int) -> list[TokenBatch]:
    """The same rows, at most `rows` a piece."""
    pieces = (tensor.split(rows) for tensor in vars(batch).values())
    return [TokenBatch(*tensors) for tensors in zip(*pieces, strict=True)]


def group_of(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """The tensors named "<group>/<name>", by name."""
    return {key.removeprefix(f"{group}/"): t for key, t in tensors.items() if key.startswith(f"{group}/")}


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}


def _load_trainable(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    weights = _trainable(model)
    if {name: w.shape for name, w in weights.items()} != {name: t.shape for name, t in tensors.items()}:
        raise CheckpointError("the saved PPO state is of other models; was it made with another plan?")
    for name, weight in weights.items():
        weight.copy_(tensors[name])
