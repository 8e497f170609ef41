"""From prompts to episodes: sample, lay out, and ask every model what it thinks of exactly these tokens.

Prompts stand left-padded before right-padded responses, so that all rows have one fixed shape and actions one fixed
place. The ids are those the sampler drew, never decoded and encoded again. A response is cut first and judged after:
the reward model, the log-probabilities and the action mask all see the same tokens.

Source: Ziegler et al. 2019, Stiennon et al. 2020, Ouyang et al. 2022; Huang et al. 2024 (2403.17031) for the details.
Suffixes: B episodes, T positions (prompt_length + response_length).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fledge.batches import RankingBatch
from fledge.errors import DataError
from fledge.infer.naive import Decode, generate
from fledge.models.scalar import ScalarModel
from fledge.objectives.clipped_policy import ActionSpace, PolicyRegion, token_logprobs
from fledge.objectives.clipped_value import action_values
from fledge.objectives.next_token import Trunk
from fledge.objectives.ranking import last_scores
from fledge.objectives.scores import ScoreRegion
from fledge.rl.reward import last_action
from fledge.types import Completion, SamplingParams


@dataclass(frozen=True)
class EpisodeShape:
    """Fixed lengths of both halves of an episode, and the ids that mean something.

    Sampling stops at any of `stop_ids`; only `end_id`, one of them, brings an answer to its end (the others, such as
    the end of a document, are what a base model says instead).
    """

    prompt_length: int
    response_length: int
    pad_id: int
    stop_ids: frozenset[int]
    end_id: int

    def __post_init__(self) -> None:
        if self.prompt_length < 1 or self.response_length < 1:
            raise ValueError(f"prompt_length and response_length must be positive, got {self}")
        if self.end_id not in self.stop_ids or self.pad_id in self.stop_ids:
            # A padding token that is also an end token would make every padded answer look finished.
            raise ValueError(
                f"stop ids {sorted(self.stop_ids)} must contain the end id {self.end_id}, not the pad id {self.pad_id}"
            )


@dataclass(frozen=True)
class Episodes:
    """Sampled tokens in place, as in `batches.Rollout`; `ended_B`: the RESPONSE ends with the end id."""

    tokens_BT: Tensor  # int64
    segments_BT: Tensor  # int32
    action_mask_BT: Tensor  # float32
    sampler_logprobs_BT: Tensor  # float32
    ended_B: Tensor  # bool

    def to(self, device: torch.device) -> Episodes:
        return Episodes(*(tensor.to(device) for tensor in vars(self).values()))

    def rows(self, indices: Tensor) -> Episodes:
        """The episodes at `indices`, in that order."""
        return Episodes(*(tensor[indices] for tensor in vars(self).values()))

    @classmethod
    def joined(cls, parts: Sequence[Episodes]) -> Episodes:
        """The episodes of all parts, one part after another."""
        return cls(*(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in parts), strict=True)))

    def spoken(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(prompt, answer) of every episode as ids, without padding."""
        tokens, segments, masks = (t.cpu() for t in (self.tokens_BT, self.segments_BT, self.action_mask_BT))
        return [
            (tuple(ids[(segment > 0) & (mask == 0)].tolist()), tuple(ids[mask > 0].tolist()))
            for ids, segment, mask in zip(tokens, segments, masks, strict=True)
        ]

    def chunks(self, size: int) -> Iterator[Episodes]:
        """The same episodes, `size` at a time."""
        pieces = (tensor.split(size) for tensor in vars(self).values())
        return (Episodes(*tensors) for tensors in zip(*pieces, strict=True))


def lay_out(prompts: Sequence[Sequence[int]], completions: Sequence[Completion], shape: EpisodeShape) -> Episodes:
    """One row an episode. `DataError` for a prompt longer than the shape allows, or an answer without tokens."""
    num_rows, num_positions = len(prompts), shape.prompt_length + shape.response_length
    # numpy's: a row of a tensor costs several times as much to write, and there are thousands.
    tokens_BT = np.full((num_rows, num_positions), shape.pad_id, dtype=np.int64)
    segments_BT = np.zeros((num_rows, num_positions), dtype=np.int32)
    sampler_logprobs_BT = np.zeros((num_rows, num_positions), dtype=np.float32)
    action_mask_BT = np.zeros((num_rows, num_positions), dtype=np.float32)
    ended_B = np.zeros(num_rows, dtype=np.bool_)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = truncate(completion.ids, shape)
        if not 0 < len(prompt) <= shape.prompt_length or not ids:
            raise DataError(
                f"episode {row} has a prompt of {len(prompt)} and an answer of {len(ids)} tokens; "
                f"expected prompts of 1 to {shape.prompt_length} tokens and answers that are not empty"
            )
        start, end = shape.prompt_length, shape.prompt_length + len(ids)
        tokens_BT[row, start - len(prompt) : end] = [*prompt, *ids]
        segments_BT[row, start - len(prompt) : end] = 1
        action_mask_BT[row, start:end] = 1.0
        sampler_logprobs_BT[row, start:end] = completion.logprobs[: len(ids)]
        ended_B[row] = ids[-1] == shape.end_id
    arrays = (tokens_BT, segments_BT, action_mask_BT, sampler_logprobs_BT, ended_B)
    return Episodes(*(torch.from_numpy(array) for array in arrays))


def truncate(ids: Sequence[int], shape: EpisodeShape) -> tuple[int, ...]:
    """The answer up to its first stop token, that included, and no longer than the shape allows."""
    for place, token in enumerate(ids[: shape.response_length]):
        if token in shape.stop_ids:
            return tuple(ids[: place + 1])
    return tuple(ids[: shape.response_length])


Scorer = Callable[[Episodes], Tensor]  # episodes -> raw scores (B,), float32
Sampler = Callable[[Any, Sequence[Sequence[int]], SamplingParams, torch.Generator], list[Completion]]


def naive_sampler(*, pad_id: int, stop_ids: frozenset[int], decode: Decode) -> Sampler:
    """A `Sampler` that decodes with the plain key/value cache of infer/naive.py."""

    def sample(
        model: Any, prompts: Sequence[Sequence[int]], params: SamplingParams, generator: torch.Generator
    ) -> list[Completion]:
        return generate(model, prompts, params, stop_ids=stop_ids, pad_id=pad_id, decode=decode, generator=generator)

    return sample


@dataclass(frozen=True)
class RewardModelScorer:
    """A `Scorer`: what `model` says at each episode's last token, `rows` episodes at a time."""

    model: ScalarModel
    rows: int = 64
    region: ScoreRegion | None = None

    @torch.no_grad()
    def __call__(self, episodes: Episodes) -> Tensor:
        scores = []
        for chunk in episodes.chunks(self.rows):
            ends_B = last_action(chunk.action_mask_BT)
            one_each_B = torch.zeros_like(ends_B)
            batch = RankingBatch(chunk.tokens_BT, chunk.segments_BT, ends_B, one_each_B, one_each_B, 1)
            scores.append(last_scores(self.model, batch, self.region))
        return torch.cat(scores)


@dataclass(frozen=True)
class Regions:
    """The costly parts of a forward pass, compiled for rows of one width; None runs eagerly, without padding."""

    policy: PolicyRegion | None = None
    scores: ScoreRegion | None = None


@torch.no_grad()
def policy_logprobs(
    model: Trunk, episodes: Episodes, space: ActionSpace, *, rows: int, region: PolicyRegion | None = None
) -> Tensor:
    """The TRAINER's log-probability of every action, (B, T), 0 elsewhere; `rows` episodes at a time."""
    logprobs = []
    for chunk in episodes.chunks(rows):
        logprobs_BT = token_logprobs(model, chunk.tokens_BT, chunk.segments_BT, space, region)
        logprobs.append(torch.where(chunk.action_mask_BT > 0, logprobs_BT, 0.0))
    return torch.cat(logprobs)


@torch.no_grad()
def state_values(model: ScalarModel, episodes: Episodes, *, rows: int, region: ScoreRegion | None = None) -> Tensor:
    """The value of the state before every action, (B, T), 0 elsewhere."""
    values = [
        action_values(model, chunk.tokens_BT, chunk.segments_BT, region) * chunk.action_mask_BT
        for chunk in episodes.chunks(rows)
    ]
    return torch.cat(values)
