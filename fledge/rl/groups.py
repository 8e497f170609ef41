"""Advantages of answers that compete within a group, and how much each of their tokens counts.

A group is `group_size` answers to one prompt; the others are the baseline, so there is no value function.

    GRPO      A_i = (s_i - mean) / (std + 1e-4)         each answer's tokens are averaged, then the answers
    Dr. GRPO  A_i = s_i - mean                          tokens are summed and divided by a constant: the length limit
    DAPO      as GRPO                                   all tokens of the batch count the same
    RLOO      A_i = s_i - mean of the others            tokens are summed, then the answers averaged

Source: Shao et al. 2024 (2402.03300), section 4.1; Liu et al. 2025 (2503.20783), section 3.1; Yu et al. 2025
(2503.14476), eq. 8, 12 and 13; Ahmadian et al. 2024 (2402.14740), eq. 8. Suffixes: B episodes, G groups, K answers of
a group, T positions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["mean", "leave_one_out"]
Scale = Literal["std", "population_std", "none"]
Normalise = Literal["answer", "token", "limit", "sum"]

# Added to the spread: the published code of GRPO and its descendants. A group without spread has advantage 0 exactly.
STD_EPS = 1e-4


def group_advantages(scores_B: Tensor, group_size: int, *, baseline: Baseline, scale: Scale) -> Tensor:
    """advantages_B of episodes that stand group after group.

    A score that is NaN (its reward could not be had) takes no part in its group and gets advantage 0; so does the only
    score of a group. "std" is the unbiased spread (n - 1), "population_std" the other.
    """
    scores_GK = scores_B.view(-1, group_size)
    is_valid_GK = ~scores_GK.isnan()
    known_GK = torch.where(is_valid_GK, scores_GK, 0.0)
    count_G1 = is_valid_GK.sum(dim=1, keepdim=True)
    mean_G1 = known_GK.sum(dim=1, keepdim=True) / count_G1.clamp(min=1)
    deviation_GK = torch.where(is_valid_GK, known_GK - mean_G1, 0.0)
    # Rounding of the mean must not become an advantage where all scores are equal.
    deviation_GK = torch.where(spread(scores_B, group_size)[:, None], deviation_GK, 0.0)
    if baseline == "leave_one_out":  # s - (n mean - s) / (n - 1) = (s - mean) n / (n - 1)
        advantages_GK = deviation_GK * count_G1 / (count_G1 - 1).clamp(min=1)
    else:
        advantages_GK = deviation_GK
    if scale != "none":
        freedom_G1 = (count_G1 - 1 if scale == "std" else count_G1).clamp(min=1)
        std_G1 = (deviation_GK.square().sum(dim=1, keepdim=True) / freedom_G1).sqrt()
        advantages_GK = advantages_GK / (std_G1 + STD_EPS)
    return advantages_GK.flatten()


def spread(scores_B: Tensor, group_size: int) -> Tensor:
    """(G,) bool: the group holds two different scores, so that there is something to learn from it."""
    scores_GK = scores_B.view(-1, group_size)
    lowest_G = torch.where(scores_GK.isnan(), torch.inf, scores_GK).amin(dim=1)
    highest_G = torch.where(scores_GK.isnan(), -torch.inf, scores_GK).amax(dim=1)
    return highest_G > lowest_G


def loss_weights(action_mask_BT: Tensor, normalise: Normalise, limit: int) -> tuple[Tensor, Tensor]:
    """(weights_BT, shares_B): the loss is sum of weight x token loss over sum of shares.

    "answer": mean over answers of the mean over tokens; "token": mean over tokens; "limit": sum over tokens, divided by
    answers x `limit`; "sum": mean over answers of the sum over tokens. An episode without actions adds nothing.
    """
    length_B = action_mask_BT.sum(dim=1)
    is_used_B = (length_B > 0).to(action_mask_BT.dtype)
    if normalise == "answer":
        return action_mask_BT / length_B.clamp(min=1)[:, None], is_used_B
    shares_B = {"token": length_B, "limit": is_used_B * limit, "sum": is_used_B}[normalise]
    return action_mask_BT, shares_B


def overlong_penalty(length_B: Tensor, *, limit: int, buffer: int) -> Tensor:
    """0 up to `limit - buffer` tokens, then falling linearly to -1 at `limit` (Yu et al. 2025, eq. 13)."""
    return -((length_B - (limit - buffer)) / buffer).clamp(0.0, 1.0)
