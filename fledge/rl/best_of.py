"""Best of n: sample n answers, keep the one with the highest score; rejection sampling keeps all that are good enough.

    KL(best of n || policy) <= log n - (n - 1) / n

with equality where no two answers score the same. From N >= n scored samples the expectation of best-of-n is known
without drawing again: the answer of rank i (from the bottom) is the best of a random n with probability
C(i - 1, n - 1) / C(N, n).

Source: Stiennon et al. 2020 (2009.01325), appendix G.3 (the KL); Nakano et al. 2021 (2112.09332), appendix I (the
estimator); Gao et al. 2022 (2210.10760), section 3. Suffixes: P prompts, N samples a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fledge.errors import ConfigError, DataError
from fledge.rl.prompts import generator_of
from fledge.rl.rollout import EpisodeShape
from fledge.rl.world import World, sample
from fledge.train.device import precision
from fledge.types import Completion

Prompt = Sequence[int]


@dataclass(frozen=True)
class Scored:
    """One prompt with its sampled answers and their scores; NaN where a reward could not be had."""

    prompt: tuple[int, ...]
    completions: tuple[Completion, ...]
    scores: tuple[float, ...]

    @property
    def best(self) -> int | None:
        """Index of the highest score, the first of equals; None if no answer has one."""
        known = [place for place, score in enumerate(self.scores) if not math.isnan(score)]
        return max(known, key=lambda place: self.scores[place]) if known else None


def kl_bound(n: int) -> float:
    """Nats an answer of best-of-n is from the policy at most; exact without ties."""
    if n < 1:
        raise ConfigError(f"best of n needs at least 1 sample, got {n}")
    return math.log(n) - (n - 1) / n


def sample_scored(
    world: World,
    policy: Any,
    prompts: Sequence[Prompt],
    shape: EpisodeShape,
    *,
    n: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Scored]:
    """`n` scored answers to each prompt; a pure function of seed and policy."""
    if n < 1 or not prompts:
        raise ConfigError(f"sampling needs at least one prompt and one answer each, got {len(prompts)} and {n}")
    asked = [prompt for prompt in prompts for _ in range(n)]
    generator = generator_of("sampling", seed, 0)
    completions, episodes = sample(world, policy, asked, shape, temperature=temperature, generator=generator)
    with torch.no_grad(), precision(episodes.tokens_BT.device):
        scores = world.scorer(episodes).float().tolist()
    return [
        Scored(tuple(prompt), tuple(completions[start : start + n]), tuple(scores[start : start + n]))
        for prompt, start in zip(prompts, range(0, len(asked), n), strict=True)
    ]


def best(scored: Sequence[Scored]) -> list[tuple[tuple[int, ...], Completion]]:
    """The best answer to each prompt; a prompt without any score is left out."""
    return [(one.prompt, one.completions[one.best]) for one in scored if one.best is not None]


def accepted(
    scored: Sequence[Scored], *, threshold: float | None = None, top: int | None = None
) -> list[tuple[tuple[int, ...], Completion]]:
    """Rejection sampling: of each prompt the answers that score at least `threshold`, and of these the `top` best.

    Equal answers to one prompt are taken once. ConfigError if neither bound is given.
    """
    if threshold is None and top is None:
        raise ConfigError("rejection sampling needs a threshold or a number of best answers to keep")
    if top is not None and top < 1:
        raise ConfigError(f"top must be at least 1, got {top}")
    kept = []
    for one in scored:
        order = sorted(range(len(one.scores)), key=lambda place: -one.scores[place])
        good = [p for p in order if not math.isnan(one.scores[p]) and (threshold is None or one.scores[p] >= threshold)]
        distinct = {one.completions[place].ids: one.completions[place] for place in good}
        kept += [(one.prompt, completion) for completion in list(distinct.values())[:top]]
    return kept


def expected_best(proxy_PN: Tensor, n: int, gold_PN: Tensor | None = None) -> float:
    """Mean over prompts of the gold score of the answer that best-of-n by proxy score picks (None: the proxy's own).

    Exact over all choices of n of the N samples; among equal proxy scores the later sample counts as higher.
    """
    num_samples = proxy_PN.shape[1]
    if not 1 <= n <= num_samples:
        raise ConfigError(f"best of {n} cannot be told from {num_samples} samples a prompt")
    if proxy_PN.isnan().any():
        raise DataError("a score is missing; leave out prompts whose answers are not all scored")
    order_PN = torch.argsort(proxy_PN, dim=1, stable=True)
    gold_PN = proxy_PN if gold_PN is None else gold_PN
    total = math.comb(num_samples, n)
    chances = [math.comb(rank, n - 1) / total for rank in range(num_samples)]
    return float((gold_PN.gather(1, order_PN).double() @ torch.tensor(chances, dtype=torch.float64)).mean())
