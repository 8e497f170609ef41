"""The policy loss of groups (GRPO and its descendants): a clipped surrogate whose upper bound may stand further off,
and the KL divergence to the reference as a term of the loss.

    loss_t = max(-A rho_t, -A clip(rho_t, 1 - eps_low, 1 + eps_high)) + beta KL_t        rho_t = pi(a_t) / pi_old(a_t)

GRPO was published with k3 as KL_t; as a loss only k2 has the gradient of KL(pi || pi_ref) (objectives/kl.py), so k2 is
the default and k3 an option.

Source: Shao et al. 2024 (2402.03300), eq. 3 and 4; clip-higher: Yu et al. 2025 (2503.14476, DAPO), eq. 10.
Suffixes: B episodes, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fledge.batches import GroupRollout, Loss, Term
from fledge.objectives.clipped_policy import (
    ActionSpace,
    PolicyRegion,
    check_clip,
    clipped_policy_loss,
    policy_stats,
    ratio_extremes,
    token_logprobs,
)
from fledge.objectives.kl import k2, k3
from fledge.objectives.next_token import Trunk

Estimator = Literal["k2", "k3"]


@dataclass(frozen=True)
class GroupPolicy:
    """`clip` is eps_low; eps_high is `clip_high`, or the same if None. `beta` 0 leaves the KL term out."""

    space: ActionSpace
    clip: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    beta: float = 0.0
    estimator: Estimator = "k2"
    region: PolicyRegion | None = None

    def __post_init__(self) -> None:
        check_clip(self.clip, self.clip_high, self.dual_clip)
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta must be 0 or more, got {self.beta}")
        if self.estimator not in ("k2", "k3"):
            raise ValueError(f"estimator must be 'k2' or 'k3', got '{self.estimator}'")

    def collate(self, examples: Sequence[GroupRollout]) -> GroupRollout:
        """Rollouts are batches already: exactly one is passed through."""
        (rollout,) = examples
        return rollout

    def loss(self, model: Trunk, batch: GroupRollout) -> Loss:
        """Terms `policy` and, with a beta, `kl`: sums over actions, weighed by the batch; figures as PPO."""
        logprobs_BT = token_logprobs(model, batch.tokens_BT, batch.segments_BT, self.space, self.region)
        return self.loss_of(logprobs_BT, batch)

    def loss_of(self, logprobs_BT: Tensor, batch: GroupRollout) -> Loss:
        """`loss`, of what the model said: `token_logprobs` of the batch."""
        is_action_BT = batch.action_mask_BT > 0
        # Positions that are no action may hold a banned token of log-probability minus infinity: keep them out.
        log_ratio_BT = torch.where(is_action_BT, logprobs_BT - batch.old_logprobs_BT, 0.0)
        loss_BT = clipped_policy_loss(log_ratio_BT, batch.advantages_BT, self.clip, self.dual_clip, self.clip_high)
        terms = {"policy": Term((loss_BT * batch.weights_BT).sum(), batch.counts["policy"])}
        if self.beta > 0:
            delta_BT = torch.where(is_action_BT, logprobs_BT - batch.reference_logprobs_BT, 0.0)
            kl_BT = k2(delta_BT) if self.estimator == "k2" else k3(delta_BT)
            terms["kl"] = Term((kl_BT * batch.weights_BT).sum(), batch.counts["kl"], self.beta)
        stats = policy_stats(log_ratio_BT.detach(), batch, self.clip, self.clip_high)
        return Loss(terms, stats, *ratio_extremes(log_ratio_BT.detach(), batch.action_mask_BT))
