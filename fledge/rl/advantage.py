"""Generalised advantage estimation and whitening.

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lambda A_{t+1}        return_t = A_t + V_t

Source: Schulman et al. 2016 (1506.02438), eq. 16; whitening by the population variance as in Ziegler et al. 2019.
Time runs over ACTIONS: tokens in between that the policy did not choose (a tool's output) are stepped over, the value
behind them is that of the next action. Suffixes: B episodes, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

WHITEN_EPS = 1e-8


def gae(
    rewards_BT: Tensor, values_BT: Tensor, action_mask_BT: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each (B, T), 0 wherever there is no action. Rewards count on actions only."""
    advantages_BT = torch.zeros_like(values_BT)
    advantage_B = torch.zeros_like(values_BT[:, 0])  # A of the next action, 0 after the last one
    value_B = torch.zeros_like(values_BT[:, 0])  # V of the next action, 0 after the last one
    for t in reversed(range(values_BT.shape[1])):
        is_action_B = action_mask_BT[:, t] > 0
        delta_B = rewards_BT[:, t] + gamma * value_B - values_BT[:, t]
        advantage_B = torch.where(is_action_B, delta_B + gamma * lam * advantage_B, advantage_B)
        value_B = torch.where(is_action_B, values_BT[:, t], value_B)
        advantages_BT[:, t] = torch.where(is_action_B, advantage_B, 0.0)
    returns_BT = torch.where(action_mask_BT > 0, advantages_BT + values_BT, 0.0)
    return advantages_BT, returns_BT


def gae_by_definition(
    rewards: list[float], values: list[float], *, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """The slow twin: one episode of actions only, A_t as the sum of (gamma lambda)^k delta_{t+k}, in Python floats."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    advantages = [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def whiten(values_BT: Tensor, mask_BT: Tensor, *, shift_mean: bool) -> Tensor:
    """Values scaled to spread 1 (population variance over the mask), with mean 0 if `shift_mean`, else kept.

    0 outside the mask. A single value, or none, has spread 0 and is left at its mean.
    """
    count = mask_BT.sum().clamp(min=1)
    mean = (values_BT * mask_BT).sum() / count
    variance = ((values_BT - mean).square() * mask_BT).sum() / count
    whitened_BT = (values_BT - mean) * torch.rsqrt(variance + WHITEN_EPS)
    return (whitened_BT if shift_mean else whitened_BT + mean) * mask_BT
