"""The figures of a round of PPO, or of groups, under the names of docs/metrics.md.

Suffixes: B episodes, T positions. Means over tokens run over actions only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fledge.batches import GroupRollout, Rollout
from fledge.rl.groups import spread
from fledge.rl.kl import k1, k3
from fledge.types import Metrics


@torch.no_grad()
def round_metrics(rollout: Rollout, ended_B: Tensor, shaped_B: Tensor) -> Metrics:
    """What the episodes of PPO were like, before anything is learned from them."""
    mask_BT = rollout.action_mask_BT
    figures = {
        "episode_reward": rollout.rewards_BT.sum(dim=1).mean(),
        "explained_variance": explained_variance(rollout.old_values_BT, rollout.returns_BT, mask_BT),
        "return_mean": (rollout.returns_BT * mask_BT).sum() / mask_BT.sum(),
    }
    return {name: float(figure) for name, figure in figures.items()} | episode_metrics(rollout, ended_B, shaped_B)


@torch.no_grad()
def group_metrics(rollout: GroupRollout, ended_B: Tensor, shaped_B: Tensor, group_size: int) -> Metrics:
    """What the groups were like: figures of the episodes that have a reward, and how many groups can teach anything."""
    is_paid_B = ~rollout.scores_B.isnan()
    figures = episode_metrics(rollout.rows(is_paid_B), ended_B[is_paid_B], shaped_B[is_paid_B])
    advantage_B = rollout.advantages_BT.abs().amax(dim=1)[is_paid_B]
    return figures | {
        "groups_without_spread": float((~spread(shaped_B, group_size)).float().mean()),
        "advantage_size": float(advantage_B.mean()),
        "failed_rewards": float((~is_paid_B).float().mean()),
    }


@torch.no_grad()
def episode_metrics(rollout: Rollout, ended_B: Tensor, shaped_B: Tensor) -> Metrics:
    """What every algorithm tells of its episodes."""
    mask_BT = rollout.action_mask_BT
    num_actions = mask_BT.sum()
    delta_BT = (rollout.old_logprobs_BT - rollout.reference_logprobs_BT) * mask_BT
    length_B = mask_BT.sum(dim=1)
    figures = {
        # Drawn from the policy itself, so the mean of -log pi is an unbiased estimate of its entropy.
        "entropy": -(rollout.old_logprobs_BT * mask_BT).sum() / num_actions,
        "kl": k1(delta_BT).sum(dim=1).mean(),
        "kl_k3": (k3(delta_BT) * mask_BT).sum(dim=1).mean(),
        "kl_per_token": k1(delta_BT).sum() / num_actions,
        "score_mean": rollout.scores_B.mean(),
        "score_std": rollout.scores_B.std(correction=0),
        "shaped_score_mean": shaped_B.mean(),
        "shaped_score_std": shaped_B.std(correction=0),
        "response_length": length_B.mean(),
        "end_rate": ended_B.float().mean(),
    }
    return {**{name: float(figure) for name, figure in figures.items()}, **sampler_gap(rollout)}


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over actions: 1 is perfect, 0 no better than a constant."""
    is_action_BT = mask_BT > 0
    returns, errors = returns_BT[is_action_BT], (returns_BT - values_BT)[is_action_BT]
    return 1 - errors.var(correction=0) / returns.var(correction=0).clamp(min=1e-8)


def sampler_gap(rollout: Rollout) -> Metrics:
    """How far sampler and trainer disagree about the same tokens: |difference of probability|, mean and largest, and
    the largest |difference of log-probability|.

    A mean below 0.005 is healthy, above 0.01 an alarm: temperature, banned ids, positions or precision differ. In
    float32 the log-probabilities differ by less than 1e-4.
    """
    old_BT, sampler_BT, mask_BT = rollout.old_logprobs_BT, rollout.sampler_logprobs_BT, rollout.action_mask_BT
    gap_BT = (old_BT.exp() - sampler_BT.exp()).abs() * mask_BT
    return {
        "sampler_gap": float(gap_BT.sum() / mask_BT.sum()),
        "sampler_gap_max": float(gap_BT.max()),
        "sampler_logprob_gap": float(((old_BT - sampler_BT).abs() * mask_BT).max()),
    }


def update_metrics(steps: Sequence[Metrics]) -> Metrics:
    """One round's optimizer steps in one: extremes of `ratio_*`, the first step's `ratio_gap`, means of the rest."""
    told: dict[str, list[float]] = {}
    for name, value in (item for step in steps for item in step.items()):
        told.setdefault(name, []).append(value)
    merged = {name: sum(values) / len(values) for name, values in told.items()}
    merged["ratio_min"], merged["ratio_max"] = min(told["ratio_min"]), max(told["ratio_max"])
    merged["ratio_gap"] = told["ratio_gap"][0]
    return merged
