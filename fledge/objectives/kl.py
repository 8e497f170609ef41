"""Estimators of the KL divergence to a reference from tokens the policy drew, with delta = log pi - log pi_ref.

Objectives use them as a loss, rl/ as a reward and as figures. Source: Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) overflows nothing; a token that far off is a bug or lost anyway


def k1(delta: Tensor) -> Tensor:
    """`delta` = log pi - log pi_ref of sampled tokens: unbiased, noisy, may be negative. The one used as reward."""
    return delta


def k2(delta: Tensor) -> Tensor:
    """delta^2 / 2: biased, low variance. As a LOSS it is the right one: its expected gradient is that of the KL.

    The expected gradient of k1 is zero, that of k3 is the gradient of the reverse divergence.
    """
    return 0.5 * delta.square()


def k3(delta: Tensor) -> Tensor:
    """exp(-delta) - 1 + delta: unbiased and never negative. The one to look at."""
    clamped = delta.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (-clamped).exp() - 1 + clamped
