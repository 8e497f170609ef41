"""Rounds of one step: the pass that says what the policy thinks of its episodes is the pass that it learns from.

Before a round's only step old and new log-probability are the same number, and one of the two passes is thrown away. So
where a whole round is one step and fits one pass, `Said` keeps the first with its graph, and the step goes backward
from there. That nothing random, and no other mask, lies between two passes (C36) is still seen: a second pass over some
of the episodes, others every round, must say the same.

Source: the ratio of Schulman et al. 2017 (1707.06347), eq. 6, at its starting point. Suffixes: B episodes, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fledge.batches import Loss, Rollout
from fledge.models.scalar import ScalarModel
from fledge.objectives.clipped_policy import ActionSpace, ratio_extremes, token_logprobs
from fledge.objectives.clipped_value import action_values
from fledge.objectives.next_token import Trunk
from fledge.rl.rollout import Episodes, policy_logprobs
from fledge.types import Metrics

NUM_ASKED_TWICE = 8


class Spoken(Protocol):
    """An objective that can go on from what the model has said already."""

    def loss_of(self, said_BT: Tensor, batch: Any, /) -> Loss: ...


@dataclass(frozen=True)
class Said:
    """What a model said, with its graph; one backward pass can be made from it. `ratio_gap`: see `ratio_extremes`."""

    said_BT: Tensor
    ratio_gap: float = 0.0

    def of_actions(self, episodes: Episodes) -> Tensor:
        """(B, T): what was said of every action, 0 elsewhere, without the graph."""
        return torch.where(episodes.action_mask_BT > 0, self.said_BT.detach(), 0.0)

    def rows(self, indices: Tensor) -> Said:
        """As `Rollout.rows`."""
        return Said(self.said_BT[indices], self.ratio_gap)

    def with_gap(self, metrics: Metrics) -> Metrics:
        """The metrics of the step that was taken from it: its own ratios are 1 by construction."""
        known = metrics.get("ratio_gap")
        return metrics if known is None else metrics | {"ratio_gap": max(known, self.ratio_gap)}


@dataclass(frozen=True)
class OnePass:
    """`objective` on the batch that `said` is of, row by row; the model is not asked again."""

    objective: Spoken
    said: Said

    def loss(self, model: Any, batch: Rollout) -> Loss:
        return self.objective.loss_of(self.said.said_BT, batch)


def value_said(model: ScalarModel, episodes: Episodes) -> Said:
    """`state_values` in one pass, as it would be in training."""
    return Said(action_values(model, episodes.tokens_BT, episodes.segments_BT))


def policy_said(model: Trunk, episodes: Episodes, space: ActionSpace, round_number: int) -> Said:
    """`policy_logprobs` in one pass, as it would be in training, beside a second pass over every n-th episode."""
    logprobs_BT = token_logprobs(model, episodes.tokens_BT, episodes.segments_BT, space)
    num_episodes = len(logprobs_BT)
    stride = max(1, num_episodes // NUM_ASKED_TWICE)
    chosen = torch.arange(round_number % stride, num_episodes, stride, device=logprobs_BT.device)
    asked = episodes.rows(chosen)
    again_BT = policy_logprobs(model, asked, space, rows=len(chosen))
    is_action_BT = asked.action_mask_BT > 0
    log_ratio_BT = torch.where(is_action_BT, logprobs_BT.detach()[chosen] - again_BT, 0.0)
    _, highs = ratio_extremes(log_ratio_BT, asked.action_mask_BT)
    return Said(logprobs_BT, float(highs["ratio_gap"]))
