"""Which prompts a round draws, and the seeds of everything random in it: pure functions of (seed, round, rank).

Nothing here remembers anything, so a run that is resumed at a round draws what the uninterrupted one drew.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

RANK_STRIDE = 100_003  # lm-human-preferences (Ziegler et al. 2019): seed + rank * 100003
_PURPOSES = {"prompts": 0, "sampling": 1, "minibatches": 2}
Purpose = Literal["prompts", "sampling", "minibatches"]


def seed_of(purpose: Purpose, seed: int, number: int, rank: int = 0) -> int:
    """A seed for one purpose in round (or pass) `number` on process `rank`."""
    words = (seed + rank * RANK_STRIDE, number, _PURPOSES[purpose])
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_of(purpose: Purpose, seed: int, number: int, rank: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(purpose, seed, number, rank))


def draw_prompts(
    num_prompts: int, num_episodes: int, *, seed: int, number: int, rank: int = 0, num_ranks: int = 1
) -> list[int]:
    """Indices of the prompts of round `number` for process `rank`.

    All processes together walk through the prompts in one shuffled order after another, `num_episodes` each a round:
    none is drawn twice before all were drawn once. ValueError if there are no prompts.
    """
    if num_prompts < 1:
        raise ValueError("PPO needs at least one prompt")
    start = (number * num_ranks + rank) * num_episodes
    orders: dict[int, list[int]] = {}
    indices = []
    for cursor in range(start, start + num_episodes):
        lap, place = divmod(cursor, num_prompts)
        if lap not in orders:
            shuffler = generator_of("prompts", seed, lap)
            orders[lap] = torch.randperm(num_prompts, generator=shuffler).tolist()
        indices.append(orders[lap][place])
    return indices
