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
from torch import Tensor, nn

from fledge.batches import Loss, Rollout, TokenBatch
from fledge.config import from_json, to_json
from fledge.errors import CheckpointError, ConfigError, TrainingHalted
from fledge.objectives.clipped_policy import MAX_LOG_RATIO, ActionSpace, ClippedPolicy
from fledge.rl.rollout import Episodes, EpisodeShape, Regions, Sampler, Scorer, lay_out
from fledge.train.device import precision
from fledge.train.loop import Objective, dump_batches
from fledge.train.parallel import ALONE, Ranks
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
    """What the policy acts in. `prompts` are token ids; `pad_id`, `stop_ids` and `end_id` as in `EpisodeShape`.

    `ranks` are the processes that learn together, all from the same weights: each draws, judges and trains on its share
    of a round's episodes, and what they learned is the same in all of them, the round's figures included.
    """

    prompts: Sequence[Sequence[int]]
    pad_id: int
    stop_ids: frozenset[int]
    end_id: int
    sampler: Sampler
    scorer: Scorer
    pretrain: PretrainMix | None = None
    regions: Regions = field(default_factory=Regions)
    dump_folder: Path | None = None
    ranks: Ranks = ALONE

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


def shared_figures(world: World) -> Metrics:
    """`scorer_figures` of the world's scorer: of several processes the mean of those that have the figure."""
    told = world.ranks.told(scorer_figures(world.scorer))
    named = {name: [one[name] for one in told if name in one] for own in told for name in own}
    return {name: sum(values) / len(values) for name, values in named.items()}


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


def together(
    world: World, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], episodes: Episodes
) -> tuple[list[Sequence[int]], list[Completion], Episodes]:
    """The prompts, answers and episodes of all processes, one process after another; each brings as many."""
    if world.ranks.count == 1:
        return list(prompts), list(completions), episodes
    said = [(tuple(prompt), to_json(completion)) for prompt, completion in zip(prompts, completions, strict=True)]
    everything = [one for own in world.ranks.told(said) for one in own]
    whole = Episodes(*(world.ranks.gathered(tensor) for tensor in vars(episodes).values()))
    return [tuple(prompt) for prompt, _ in everything], [from_json(Completion, told) for _, told in everything], whole


def require_shares(ranks: Ranks, **counts: int) -> None:
    """`ConfigError` if the processes could not each have the same share of every one of `counts`."""
    for name, count in counts.items():
        if count % ranks.count:
            raise ConfigError(f"{name} {count} is no multiple of the {ranks.count} processes that learn together")


def require_alike(ranks: Ranks, *models: nn.Module) -> None:
    """`CheckpointError` if the processes do not start from the same weights: their steps would mean nothing."""
    if ranks.count == 1:
        return
    sums = [float(weight.detach().double().sum()) for model in models for weight in model.parameters()]
    if any(told != sums for told in ranks.told(sums)):
        raise CheckpointError("the processes that learn together start from different weights; load the same model")


def pretraining_pairs(
    world: World, weight: float, *, step: int, rows: int, forward_rows: int
) -> list[tuple[Objective, TokenBatch]]:
    """This process's share of the pretraining rows of optimizer step `step`, weighed, in pieces that fit a forward
    pass."""
    if world.pretrain is None or weight == 0:
        return []
    objective = Weighted(world.pretrain.objective, weight)
    batch = world.pretrain.batch(step, rows)
    own = world.ranks.own(len(batch.tokens_BT))
    mine = batch if world.ranks.count == 1 else TokenBatch(*(tensor[own] for tensor in vars(batch).values()))
    return [(objective, part) for part in split_rows(mine, forward_rows) if len(part.tokens_BT)]


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
    whose = "" if world.ranks.count == 1 else f"-of-process-{world.ranks.number}"
    return None if world.dump_folder is None else world.dump_folder / f"halted-{number}-{name}{whose}.safetensors"


def halt(world: World, number: int, why: str, batch: Rollout, space: ActionSpace) -> NoReturn:
    """Write the batch to disk and raise TrainingHalted."""
    path = dump_path(world, number, "rollout")
    if path is not None:
        dump_batches([(ClippedPolicy(space), batch)], path)
    raise TrainingHalted(f"round {number}: {why}; batch in {path or 'nowhere (no dump_folder)'}")
