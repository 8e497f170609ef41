"""KL divergence to the reference policy: estimators, and controllers of its price beta.

Source: Schulman 2020, "Approximating KL divergence" (k1, k2, k3); Ziegler et al. 2019 (1909.08593), section 2.2
(adaptive controller).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MAX_ERROR = 0.2  # Ziegler et al. 2019: the proportional error is clipped to +-0.2
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


@dataclass(frozen=True)
class KLConfig:
    """`beta` is the first price; with a `target` (nats an episode) it follows, over about `horizon` episodes.

    InstructGPT keeps 0.02 fixed; Ziegler et al. start at 0.15 with target 6 and horizon 10,000.
    """

    beta: float = 0.02
    target: float | None = None
    horizon: int = 10_000

    def __post_init__(self) -> None:
        if self.beta < 0 or self.horizon < 1 or (self.target is not None and self.target <= 0):
            raise ValueError(f"beta must be 0 or more, target and horizon positive, got {self}")
        if self.target is not None and self.beta == 0:
            raise ValueError("an adaptive beta cannot start at 0, which it never leaves; set kl.beta above 0")


def next_beta(beta: float, config: KLConfig, *, kl: float, num_episodes: int) -> float:
    """beta after a round of `num_episodes` whose mean KL was `kl` nats an episode; unchanged without a target."""
    if config.target is None:
        return beta
    error = min(max(kl / config.target - 1, -MAX_ERROR), MAX_ERROR)
    return beta * (1 + error * num_episodes / config.horizon)
