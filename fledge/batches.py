"""The values that hold tensors: what objectives make of examples, what they return, what RL hands to them.

Shape suffixes: B rows, T positions, N sequences, P pairs. `segments` number the documents packed into a row from 1; 0
marks padding. `counts` are known when a batch is collated, so that a step can divide sums by the count of the whole
batch before it has seen every micro-batch (train/loop.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
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
    """What an objective returns: terms to minimise, and statistics as (sum, count) pairs to report as means.

    Of `lows` and `highs` a step reports the least and the greatest of its micro-batches; one that has nothing to say
    leaves them out.
    """

    terms: Mapping[str, Term]
    stats: Mapping[str, tuple[Tensor, float]]
    lows: Mapping[str, Tensor] = field(default_factory=dict)
    highs: Mapping[str, Tensor] = field(default_factory=dict)


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
    # Where pairs have labels of their own: how much the loss that row i beats row j counts, and by what margin it must.
    weights_NN: Tensor | None = None  # float32; sums to 1 over the pairs of a prompt
    margins_NN: Tensor | None = None  # float32; of (j, i) minus that of (i, j)

    @property
    def counts(self) -> Mapping[str, float]:
        return {"ranking": float(self.num_prompts)}


@dataclass(frozen=True)
class PreferenceBatch(_Tensors):
    """Completions, one row each, and the pairs that are compared; a completion of several pairs has one row."""

    tokens_NT: Tensor  # int64: prompt and completion, padded on the right
    segments_NT: Tensor  # int32: 1 on real tokens, 0 on padding
    mask_NT: Tensor  # float32: 1 on the completion's tokens
    first_P: Tensor  # int64: row of the first completion of a pair
    second_P: Tensor  # int64
    preference_P: Tensor  # float32: probability that the first one is preferred
    weight_P: Tensor  # float32: how much a pair counts
    reference_N: Tensor | None = None  # float32: reference log-probability of each completion

    @property
    def counts(self) -> Mapping[str, float]:
        return {"preference": float(self.weight_P.sum())}


@dataclass(frozen=True)
class VerdictBatch(_Tensors):
    """Completions judged one by one (KTO), one row each, then as many prompts with another prompt's completion."""

    tokens_NT: Tensor  # int64: the judged rows, then the mismatched ones; padded on the right
    segments_NT: Tensor  # int32: 1 on real tokens, 0 on padding
    mask_NT: Tensor  # float32: 1 on the completion's tokens
    desirable_B: Tensor  # bool: the verdict on each of the first B rows
    reference_N: Tensor | None = None  # float32: reference log-probability of each row's completion
    baseline: Tensor | None = None  # float32 scalar: z_0 of the whole batch, if it was computed beforehand

    @property
    def counts(self) -> Mapping[str, float]:
        return {"kto": float(len(self.desirable_B))}


@dataclass(frozen=True)
class LabelBatch(_Tensors):
    """Whole texts, one row each, with what is known of each category K."""

    tokens_BT: Tensor  # int64: right-padded
    segments_BT: Tensor  # int32: 1 on real tokens, 0 on padding
    targets_BK: Tensor  # float32: 1 where the category holds
    weights_BK: Tensor  # float32: how much a label counts; 0 where it is unknown

    @property
    def counts(self) -> Mapping[str, float]:
        return {"labels": float(self.weights_BK.sum())}


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

    def rows(self, indices: Tensor) -> Self:
        """The episodes at `indices`, in that order."""
        chosen = {
            field.name: getattr(self, field.name)[indices]
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, **chosen)


@dataclass(frozen=True)
class GroupRollout(Rollout):
    """Episodes in groups that answer the same prompt: no value function, so values and returns are 0.

    `weights_BT` says how much an action counts and `shares_B` how much an episode adds to the count that the sum is
    divided by: together they are the normalisation of the loss (rl/groups.py).
    """

    group_B: Tensor  # int64: which group an episode belongs to
    weights_BT: Tensor  # float32; 0 wherever there is no action
    shares_B: Tensor  # float32

    @property
    def counts(self) -> Mapping[str, float]:
        count = float(self.shares_B.sum())
        return {"policy": count, "kl": count}
