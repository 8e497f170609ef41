"""From reward-model scores to the reward of every token.

    r_t = -beta (log pi(a_t) - log pi_ref(a_t)) + [t is the episode's last action] score

Source: Ouyang et al. 2022 (2203.02155), eq. 2; the price of a missing end is that of Stiennon et al. 2020 and of
Huang et al. 2024 (2403.17031). Suffixes: B episodes, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fledge.rl.advantage import whiten


@dataclass(frozen=True)
class RewardConfig:
    """What happens to a raw score before it becomes a reward, in this order.

    `missing_end_score` replaces the score of an answer without an end-of-turn token, `missing_end_penalty` is
    subtracted from it (one of the two; None switches off). `normalise` divides by the running spread of all scores
    so far, around their mean. `clip` bounds the result to +-clip. `whiten` scales the finished token rewards of a
    round to spread 1, without moving their mean.
    """

    missing_end_score: float | None = -1.0
    missing_end_penalty: float | None = None
    normalise: bool = False
    clip: float | None = None
    whiten: bool = False

    def __post_init__(self) -> None:
        if self.missing_end_score is not None and self.missing_end_penalty is not None:
            raise ValueError("missing_end_score and missing_end_penalty exclude each other; set one to null")
        if self.missing_end_penalty is not None and self.missing_end_penalty < 0:
            raise ValueError(f"missing_end_penalty is subtracted and must be 0 or more, got {self}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"reward clip must be positive, got {self.clip}; null switches it off")


@dataclass(frozen=True)
class Moments:
    """Running count, mean and sum of squared deviations of all scores seen (Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_scores(self, scores_B: Tensor) -> Moments:
        scores_B = scores_B.double()
        if not scores_B.numel():
            return self
        num, mean = scores_B.numel(), float(scores_B.mean())
        total = self.count + num
        gap = mean - self.mean
        squares = self.squares + float((scores_B - mean).square().sum()) + gap * gap * self.count * num / total
        return Moments(total, self.mean + gap * num / total, squares)

    @property
    def std(self) -> float:
        return (self.squares / self.count) ** 0.5 if self.count else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}


def shape_scores(scores_B: Tensor, ended_B: Tensor, config: RewardConfig, moments: Moments) -> Tensor:
    """What the policy is paid for whole episodes. `moments` (this round's included) serve `normalise` only."""
    shaped_B = scores_B
    if config.normalise:
        shaped_B = (shaped_B - moments.mean) / max(moments.std, 1e-6)
    if config.clip is not None:
        shaped_B = shaped_B.clamp(-config.clip, config.clip)
    # After scaling, so that the price of a missing end stays what the config says.
    if config.missing_end_score is not None:
        shaped_B = torch.where(ended_B, shaped_B, config.missing_end_score)
    if config.missing_end_penalty is not None:
        shaped_B = torch.where(ended_B, shaped_B, shaped_B - config.missing_end_penalty)
    return shaped_B


def token_rewards(
    delta_BT: Tensor, shaped_B: Tensor, action_mask_BT: Tensor, *, beta: float, whiten_rewards: bool = False
) -> Tensor:
    """rewards_BT, 0 wherever there is no action. `delta_BT` is log pi - log pi_ref of the sampled tokens."""
    rewards_BT = -beta * torch.where(action_mask_BT > 0, delta_BT, 0.0)
    rows = torch.arange(len(shaped_B), device=shaped_B.device)
    rewards_BT[rows, last_action(action_mask_BT)] += shaped_B
    return whiten(rewards_BT, action_mask_BT, shift_mean=False) if whiten_rewards else rewards_BT


def last_action(action_mask_BT: Tensor) -> Tensor:
    """Index (B,) of the last action of each episode."""
    index_T = torch.arange(action_mask_BT.shape[1], device=action_mask_BT.device)
    return torch.where(action_mask_BT > 0, index_T, 0).amax(dim=1)
