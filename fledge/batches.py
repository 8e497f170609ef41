"""The values that hold tensors: what objectives make of examples, what they return, what RL hands to them.

Shape suffixes: B rows, T positions, N sequences. `segments` number the documents packed into a row from 1; 0 marks
padding. `counts` are known when a batch is collated, so that a step can divide sums by the count of the whole
batch before it has seen every micro-batch (train/loop.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One term of a loss: a SUM over `count` items, entering the total as `weight * sum / global count`."""

    sum: Tensor
    count: float
    weight: float = 1.0


@dataclass(frozen=True)
class Loss:
    """What an objective returns: terms to minimise, and statistics as (sum, count) pairs to report as means."""

    terms: Mapping[str, Term]
    stats: Mapping[str, tuple[Tensor, float]]


class Batch(Protocol):
    """What `train_step` asks of a batch: the count of every loss term, and a way to move to a device."""

    @property
    def counts(self) -> Mapping[str, float]: ...

    def to(self, device: torch.device) -> Self: ...


@dataclass(frozen=True)
class _Tensors:
    """Shared by all batches: moving every tensor field to a device."""

    def to(self, device: torch.device) -> Self:
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class TokenBatch(_Tensors):
    """Rows of tokens with, for each position, the token that follows it in its own document."""

    tokens_BT: Tensor  # int64
    targets_BT: Tensor  # int64; any valid id where mask is 0
    mask_BT: Tensor  # float32; 1 where the target counts, may hold per-token weights
    segments_BT: Tensor  # int32; 0 is padding

    @property
    def counts(self) -> Mapping[str, float]:
        return {"next_token": float(self.mask_BT.sum())}


@dataclass(frozen=True)
class RankingBatch(_Tensors):
    """Completions of several prompts, one row a completion (never one row a pair), right-padded."""

    tokens_NT: Tensor  # int64: prompt and completion, padded on the right
    segments_NT: Tensor  # int32: 1 on real tokens, 0 on padding
    ends_N: Tensor  # int64: index of the last real token, where the score is read
    prompt_N: Tensor  # int64: which prompt (0..P-1) a row answers
    ranks_N: Tensor  # int64: 1 is best within its prompt
    num_prompts: int

    @property
    def counts(self) -> Mapping[str, float]:
        return {"ranking": float(self.num_prompts)}


@dataclass(frozen=True)
class Rollout(_Tensors):
    """Sampled episodes with everything a policy update reads. Prompts stand left-padded before the responses.

    Position t of a `_BT` field other than `tokens_BT` speaks of the ACTION `tokens_BT[:, t]` (the token itself, not
    the one after it). `action_mask_BT` is 1 from the first response token to the end-of-turn token inclusive.
    """

    tokens_BT: Tensor  # int64: exactly the ids the sampler drew
    segments_BT: Tensor  # int32: 1 on prompt and response, 0 on padding either side
    action_mask_BT: Tensor  # float32
    old_logprobs_BT: Tensor  # float32: trainer's log-probabilities of the policy that sampled
    reference_logprobs_BT: Tensor  # float32
    old_values_BT: Tensor  # float32: value of the state in which the action was taken
    rewards_BT: Tensor  # float32: KL penalty everywhere, score on the end token
    advantages_BT: Tensor  # float32, whitened
    returns_BT: Tensor  # float32
    scores_B: Tensor  # float32: raw reward-model score
    sampler_logprobs_BT: Tensor  # float32: what the sampler said, for the sampler-versus-trainer gap
    policy_version: int

    @property
    def counts(self) -> Mapping[str, float]:
        actions = float(self.action_mask_BT.sum())
        return {"policy": actions, "value": actions}

    def rows(self, indices: Tensor) -> Rollout:
        """The episodes at `indices`, in that order."""
        chosen = {
            field.name: getattr(self, field.name)[indices]
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, **chosen)
