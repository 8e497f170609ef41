"""FeedME: supervised learning on demonstrations and on the model's own answers that were rated high, again and again.

    sample n answers a prompt -> rate -> keep rating >= threshold (or the top k) -> SFT on demonstrations and kept

So text-davinci-001 and 002 were made ("trained on human demonstrations and on model samples rated 7/7 by human
labelers", OpenAI's model index for researchers); PPO made 003. The rater is any `Scorer`: a reward model, a verifier, a
table of human ratings. Kept answers are de-duplicated, and none answers a prompt that evaluation holds back.

A round's data is what all rounds so far have kept, so a model is never trained on less than it was before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fledge.errors import ConfigError, DataError
from fledge.objectives.next_token import NextToken
from fledge.rl.best_of import Scored, accepted, sample_scored
from fledge.rl.prompts import draw_prompts, generator_of, seed_of
from fledge.rl.saving import flat, group_of, load_trainable, trainable
from fledge.rl.world import World, dump_path
from fledge.train.loop import train_step
from fledge.train.optim import OptimConfig, OptimizerSet
from fledge.types import Metrics, Piece

Ids = tuple[int, ...]
Demonstration = tuple[Ids, Ids]  # prompt and reply, the reply's end token included


@dataclass(frozen=True)
class FeedMEConfig:
    """`rounds` of `prompts` prompts with `samples` answers each, then `steps` optimizer steps on `rows` rows.

    Kept are answers rated at least `threshold`, and of those the `top` of each prompt; one of the two may be None.
    Answers that people rated at least `rating` beforehand are demonstrations (`rated_high`).
    `demonstration_share` of each step's rows are demonstrations, as far as there are any. An answer that ran out of
    tokens is no demonstration and is never kept.
    """

    rounds: int = 3
    prompts: int = 64
    samples: int = 8
    threshold: float | None = 7.0
    top: int | None = None
    steps: int = 30
    rows: int = 32
    demonstration_share: float = 0.25
    rating: float = 7.0
    prompt_length: int = 64
    response_length: int = 48
    temperature: float = 1.0
    optim: OptimConfig = field(default_factory=lambda: OptimConfig.adamw(3e-4))
    clip_norm: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rounds, self.prompts, self.samples, self.steps, self.rows) < 1:
            raise ValueError(f"rounds, prompts, samples, steps and rows must be at least 1, got {self}")
        if self.threshold is None and self.top is None:
            raise ConfigError("FeedME needs a threshold, or a number of top answers to keep")
        if self.top is not None and self.top < 1:
            raise ValueError(f"top must be at least 1, got {self.top}")
        if not 0 <= self.demonstration_share <= 1:
            raise ValueError(f"demonstration_share must lie between 0 and 1, got {self.demonstration_share}")


@dataclass(frozen=True)
class FeedMERound:
    """What one round did: its metrics, every answer with its rating, and how many of them were kept anew."""

    metrics: Metrics
    scored: list[Scored]
    kept: list[Demonstration]


def keep_rated(
    scored: Sequence[Scored],
    *,
    threshold: float | None,
    top: int | None,
    end_id: int,
    held_out: frozenset[Ids],
    known: frozenset[Demonstration] = frozenset(),
) -> list[Demonstration]:
    """Answers good enough, that end, to prompts that are not held out, each once and none of `known`, in order."""
    good = accepted([one for one in scored if one.prompt not in held_out], threshold=threshold, top=top)
    pairs = [(prompt, completion.ids) for prompt, completion in good if completion.ids and completion.ids[-1] == end_id]
    return [pair for pair in dict.fromkeys(pairs) if pair not in known]


def rated_high(rated: Sequence[tuple[Demonstration, float]], config: FeedMEConfig) -> list[Demonstration]:
    """Those of the answers that people rated at least `rating`, each once."""
    return list(dict.fromkeys(one for one, rating in rated if rating >= config.rating))


class FeedME:
    """The state of a run; `round()` advances it. `tensors`, `scalars` and `load` save and restore it to the bit."""

    def __init__(
        self,
        config: FeedMEConfig,
        policy: nn.Module,
        world: World,
        demonstrations: Sequence[Demonstration] = (),
        held_out: Sequence[Sequence[int]] = (),
    ) -> None:
        """`held_out`: the prompts of evaluation. DataError if a demonstration answers one of them."""
        self.config, self.policy, self.world = config, policy, world
        self.demonstrations = list(demonstrations)
        self.held_out = frozenset(tuple(prompt) for prompt in held_out)
        if any(prompt in self.held_out for prompt, _ in self.demonstrations):
            raise DataError("a demonstration answers a prompt that is held out for evaluation; drop it")
        self.shape = world.shape(config.prompt_length, config.response_length)
        self.prompts = [tuple(prompt) for prompt in world.prompts if tuple(prompt) not in self.held_out]
        if not self.prompts:
            raise DataError("every prompt is held out for evaluation; FeedME needs others")
        self.objective = NextToken(config.prompt_length + config.response_length, world.pad_id)
        self.optimizers = OptimizerSet(policy, config.optim)
        self.kept: list[Demonstration] = []
        self.round_number = 0

    def round(self) -> FeedMERound:
        """Sample, rate, keep, learn. TrainingHalted if a loss is not a number."""
        scored = self._sample()
        config = self.config
        new = keep_rated(
            scored,
            threshold=config.threshold,
            top=config.top,
            end_id=self.world.end_id,
            held_out=self.held_out,
            known=frozenset(self.kept),
        )
        self.kept += new
        ratings = torch.tensor([score for one in scored for score in one.scores])
        metrics: Metrics = {
            "round": float(self.round_number),
            "score_mean": float(ratings.nanmean()),
            "failed_rewards": float(ratings.isnan().float().mean()),
            "kept": float(len(new)),
            "kept_share": len(new) / ratings.numel(),
            "kept_total": float(len(self.kept)),
        }
        metrics |= self._learn()
        self.round_number += 1
        return FeedMERound(metrics, scored, new)

    def _sample(self) -> list[Scored]:
        config = self.config
        self.policy.eval()
        chosen = draw_prompts(len(self.prompts), config.prompts, seed=config.seed, number=self.round_number)
        return sample_scored(
            self.world,
            self.policy,
            [self.prompts[index] for index in chosen],
            self.shape,
            n=config.samples,
            temperature=config.temperature,
            seed=seed_of("sampling", config.seed, self.round_number),
        )

    def _learn(self) -> Metrics:
        """`steps` optimizer steps; nothing happens, and that is told, while there is nothing to learn from."""
        if not self.kept and not self.demonstrations:
            return {"loss": 0.0, "steps": 0.0}
        self.policy.train()
        dump = dump_path(self.world, self.round_number, "feedme")
        losses = []
        for step in range(self.config.steps):
            number = self.round_number * self.config.steps + step
            torch.manual_seed(seed_of("minibatches", self.config.seed, number))  # of dropout
            batch = self.objective.collate([(piece_of(*pair),) for pair in self._rows(number)])
            pairs = [(self.objective, batch)]
            found = train_step(self.policy, self.optimizers, pairs, clip_norm=self.config.clip_norm, dump_to=dump)
            losses.append(found["loss"])
        self.policy.eval()
        return {"loss": sum(losses) / len(losses), "steps": float(len(losses))}

    def _rows(self, number: int) -> list[Demonstration]:
        """The rows of optimizer step `number`, drawn with replacement in the stated shares."""
        generator = generator_of("minibatches", self.config.seed, number)
        share = self.config.demonstration_share if self.kept else 1.0
        num_shown = round(share * self.config.rows) if self.demonstrations else 0
        parts = ((self.demonstrations, num_shown), (self.kept, self.config.rows - num_shown))
        return [
            source[int(place)]
            for source, count in parts
            if count
            for place in torch.randint(len(source), (count,), generator=generator)
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Trained weights and optimizer states, flat by name; not copies."""
        return flat({"policy": trainable(self.policy), "policy_optimizer": self.optimizers.tensors()})

    def scalars(self) -> dict[str, Any]:
        """What `tensors` cannot hold, as JSON values: the round and every answer kept."""
        return {"round": self.round_number, "kept": [[list(prompt), list(reply)] for prompt, reply in self.kept]}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Go on where another run of the same config and world stood. CheckpointError if the weights do not fit."""
        load_trainable(self.policy, group_of(tensors, "policy"))
        self.optimizers.load_tensors(group_of(tensors, "policy_optimizer"))
        self.round_number = int(scalars["round"])
        self.kept = [(tuple(prompt), tuple(reply)) for prompt, reply in scalars["kept"]]


def piece_of(prompt: Ids, reply: Ids) -> Piece:
    """A demonstration to learn from: the loss counts on the reply, its end token included, and on nothing else."""
    ids = np.array([*prompt, *reply], dtype=np.int32)
    return Piece(ids, np.array([0.0] * len(prompt) + [1.0] * len(reply), dtype=np.float32))
