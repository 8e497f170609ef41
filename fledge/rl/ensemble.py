"""Several reward models as one: the mean, less a price for their disagreement.

    score = mean_k r_k - k x std_k r_k

An answer that only some models like is likely to exploit them: conservative scores resist over-optimisation.

Source: Coste et al. 2024 (2310.02743), section 3 (uncertainty-weighted optimisation; there the variance). Suffix: B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fledge.errors import ConfigError
from fledge.rl.rollout import Episodes, Scorer
from fledge.types import Metrics


class EnsembleScorer:
    """A `Scorer` and a `Reporting`. `caution` is k; 0 is the plain mean."""

    def __init__(self, members: Sequence[Scorer], caution: float = 0.0) -> None:
        if len(members) < 2:
            raise ConfigError(f"an ensemble needs at least two reward models, got {len(members)}")
        if not 0 <= caution < float("inf"):
            raise ConfigError(f"caution must be 0 or more, got {caution}")
        self.members, self.caution = tuple(members), caution
        self._disagreements: list[Tensor] = []

    def __call__(self, episodes: Episodes) -> Tensor:
        scores_B, disagreement_B = combined([member(episodes) for member in self.members], self.caution)
        self._disagreements.append(disagreement_B.cpu())
        return scores_B

    def figures(self) -> Metrics:
        """Since the last call of this: `reward_disagreement`, the mean spread between members, and the largest."""
        if not self._disagreements:
            return {}
        spread_B = torch.cat(self._disagreements)
        self._disagreements.clear()
        return {"reward_disagreement": float(spread_B.mean()), "reward_disagreement_max": float(spread_B.max())}


def combined(scores: Sequence[Tensor], caution: float) -> tuple[Tensor, Tensor]:
    """(mean - caution x std, std) over members, each (B,); the spread is the population's."""
    scores_MB = torch.stack([member_B.float() for member_B in scores])
    std_B = scores_MB.std(dim=0, correction=0)
    return scores_MB.mean(dim=0) - caution * std_B, std_B
