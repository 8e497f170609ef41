"""PPO's value loss: squared error to the returns, with the change since the rollout clipped.

    loss_t = 1/2 max((V_t - R_t)^2, (clip(V_t, V_old_t - eps, V_old_t + eps) - R_t)^2)

Source: Dhariwal et al. 2017 (OpenAI Baselines, ppo2), which Ziegler et al. 2019 (1909.08593) and InstructGPT follow.
Suffixes: B episodes, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.batches import Loss, Rollout, Term
from fledge.objectives.scores import Judge, ScoreRegion, token_scores


@dataclass(frozen=True)
class ClippedValue:
    """`clip` is epsilon, in units of the (normalised) reward; None trains on the plain squared error."""

    clip: float | None = 0.2
    region: ScoreRegion | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"value clip must be positive, got {self.clip}; None switches it off")

    def collate(self, examples: Sequence[Rollout]) -> Rollout:
        """Rollouts are batches already: exactly one is passed through."""
        (rollout,) = examples
        return rollout

    def loss(self, model: Judge, batch: Rollout) -> Loss:
        """Term `value`: sum over actions. Stats: squared error, value, share of actions whose value was clipped."""
        return self.loss_of(action_values(model, batch.tokens_BT, batch.segments_BT, self.region), batch)

    def loss_of(self, values_BT: Tensor, batch: Rollout) -> Loss:
        """`loss`, of what the model said: `action_values` of the batch."""
        mask_BT, count = batch.action_mask_BT, batch.counts["value"]
        loss_BT = clipped_value_loss(values_BT, batch.old_values_BT, batch.returns_BT, self.clip)
        with torch.no_grad():
            moved_BT = (values_BT - batch.old_values_BT).abs()
            is_clipped_BT = moved_BT > (float("inf") if self.clip is None else self.clip)
            stats = {
                "value_error": (((values_BT - batch.returns_BT).square() * mask_BT).sum(), count),
                "value": ((values_BT * mask_BT).sum(), count),
                "value_clip_fraction": ((is_clipped_BT * mask_BT).sum(), count),
            }
        return Loss({"value": Term((loss_BT * mask_BT).sum(), count)}, stats)


def action_values(model: Judge, tokens_BT: Tensor, segments_BT: Tensor, region: ScoreRegion | None = None) -> Tensor:
    """Value of the state in which each token was chosen: what the model says one position EARLIER; 0 at the first."""
    return F.pad(token_scores(model, tokens_BT, segments_BT, region)[:, :-1], (1, 0))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """The loss of each action."""
    error = (values - returns).square()
    if clip is None:
        return 0.5 * error
    near_old = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(error, (near_old - returns).square())
