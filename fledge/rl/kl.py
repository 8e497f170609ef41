"""The price beta of the KL divergence to the reference policy: fixed, or steered towards a target.

The estimators of the divergence are those of objectives/kl.py. Source: Ziegler et al. 2019 (1909.08593), section 2.2
(adaptive controller).
"""

from __future__ import annotations

from dataclasses import dataclass

from fledge.objectives.kl import k1, k2, k3

__all__ = ["KLConfig", "k1", "k2", "k3", "next_beta"]

MAX_ERROR = 0.2  # Ziegler et al. 2019: the proportional error is clipped to +-0.2


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
