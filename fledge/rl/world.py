"""What a policy acts in, and what a round of every algorithm does alike: sample, mix in pretraining rows, halt.

Source: Ouyang et al. 2022 (2203.02155), section 3.5 and appendix C.4; sampler correction: Yao et al. 2025, "Your
efficient RL framework secretly brings you off-policy RL training". Suffixes: B episodes, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor

from fledge.batches import Loss, Rollout, TokenBatch
from fledge.errors import TrainingHalted
from fledge.objectives.clipped_policy import MAX_LOG_RATIO, ActionSpace, ClippedPolicy
from fledge.rl.rollout import Episodes, EpisodeShape, Regions, Sampler, Scorer, lay_out
from fledge.train.device import precision
from fledge.train.loop import Objective, dump_batches
from fledge.types import Completion, Metrics, SamplingParams

MIN_MINIBATCH = 8  # fewer episodes make a step's advantages noise
# How far a probability ratio may be from 1 before anything has been learned: rounding, by precision.
RATIO_TOLERANCE = {"cpu": 1e-5, "cuda": 1e-2}


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

    def shape(self, prompt_length: int, response_length: int) -> EpisodeShape:
        return EpisodeShape(prompt_length, response_length, self.pad_id, self.stop_ids, self.end_id)


@dataclass(frozen=True)
class Round:
    """What one round did: its metrics (docs/metrics.md), what was said, and the tensors it learned from."""

    metrics: Metrics
    prompts: list[Sequence[int]]
    completions: list[Completion]
    rollout: Rollout


@runtime_checkable
class Reporting(Protocol):
    """A scorer that has figures of its own about what it scored last."""

    def figures(self) -> Metrics: ...


def scorer_figures(scorer: Scorer) -> Metrics:
    """The scorer's own figures about its last call, if it has any."""
    return scorer.figures() if isinstance(scorer, Reporting) else {}


def sample(
    world: World,
    policy: Any,
    prompts: Sequence[Sequence[int]],
    shape: EpisodeShape,
    *,
    temperature: float,
    generator: torch.Generator,
) -> tuple[list[Completion], Episodes]:
    """One answer to each prompt, as drawn and laid out on the policy's device."""
    device = next(policy.parameters()).device
    params = SamplingParams(max_tokens=shape.response_length, temperature=temperature)
    with precision(device):
        completions = world.sampler(policy, prompts, params, generator)
    return completions, lay_out(prompts, completions, shape).to(device)


def pretraining_pairs(
    mix: PretrainMix | None, weight: float, *, step: int, rows: int, forward_rows: int
) -> list[tuple[Objective, TokenBatch]]:
    """The pretraining rows of optimizer step `step`, weighed, in pieces that fit a forward pass."""
    if mix is None or weight == 0:
        return []
    objective = Weighted(mix.objective, weight)
    return [(objective, part) for part in split_rows(mix.batch(step, rows), forward_rows)]


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


def sampler_correction(old_BT: Tensor, episodes: Episodes, cap: float | None) -> Tensor | float:
    """Truncated importance weights min(pi_old / pi_sampler, cap) of the actions, 1 elsewhere; 1 without a cap.

    Where the engine that draws computes otherwise than the trainer (Yao et al. 2025), a token's loss times its weight
    is on average the loss of what the trainer's own policy would have drawn; the cap bounds its variance.
    """
    if cap is None:
        return 1.0
    log_ratio_BT = (old_BT - episodes.sampler_logprobs_BT) * episodes.action_mask_BT
    return log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


def failed_rewards(scores_B: Tensor) -> Tensor:
    """(B,) bool: the reward could not be had (NaN); such an episode is left out, never paid 0."""
    return scores_B.isnan()


def dump_path(world: World, number: int, name: str) -> Path | None:
    """Where round `number` leaves a batch that halts it."""
    return None if world.dump_folder is None else world.dump_folder / f"halted-{number}-{name}.safetensors"


def halt(world: World, number: int, why: str, batch: Rollout, space: ActionSpace) -> NoReturn:
    """Write the batch to disk and raise TrainingHalted."""
    path = dump_path(world, number, "rollout")
    if path is not None:
        dump_batches([(ClippedPolicy(space), batch)], path)
    raise TrainingHalted(f"round {number}: {why}; batch in {path or 'nowhere (no dump_folder)'}")
