"""Groups of answers for a round, scored; groups that teach nothing may be replaced by those of further prompts.

A group whose scores are all the same has advantage 0 throughout. DAPO draws on until a round is full of others
("dynamic sampling"); here the number of further draws is bounded, and what is still missing then is filled up with
such groups.

Source: Yu et al. 2025 (2503.14476), section 3.2. Suffixes: B episodes, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fledge.rl.groups import spread
from fledge.rl.prompts import draw_prompts, generator_of
from fledge.rl.rollout import Episodes, EpisodeShape
from fledge.rl.world import World, sample
from fledge.train.device import precision
from fledge.types import Completion


@dataclass(frozen=True)
class Draw:
    """`prompts` prompts a process with `group` answers each, and at most `redraws` further draws in place of equal
    groups."""

    prompts: int
    group: int
    redraws: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Gathered:
    """Episodes that stand group after group, with their raw scores (NaN: none could be had)."""

    prompts: list[Sequence[int]]
    completions: list[Completion]
    episodes: Episodes
    scores_B: Tensor
    redraws: int


def gather(draw: Draw, world: World, policy: Any, shape: EpisodeShape, cursor: int) -> tuple[Gathered, int]:
    """The groups of a round, and the cursor behind the last draw; a pure function of cursor, seed and policy."""
    drawn = [_one_draw(draw, world, policy, shape, cursor)]
    while len(drawn) <= draw.redraws and _is_wanting(drawn, draw, world):
        drawn.append(_one_draw(draw, world, policy, shape, cursor + len(drawn)))
    return _best(drawn, draw), cursor + len(drawn)


def _one_draw(draw: Draw, world: World, policy: Any, shape: EpisodeShape, number: int) -> Gathered:
    ranks = world.ranks
    chosen = draw_prompts(
        len(world.prompts), draw.prompts, seed=draw.seed, number=number, rank=ranks.number, num_ranks=ranks.count
    )
    prompts = [world.prompts[index] for index in chosen for _ in range(draw.group)]
    generator = generator_of("sampling", draw.seed, number, ranks.number)
    completions, episodes = sample(world, policy, prompts, shape, temperature=draw.temperature, generator=generator)
    with precision(episodes.tokens_BT.device):
        scores_B = world.scorer(episodes).float()
    return Gathered(prompts, completions, episodes, scores_B, 0)


def _is_wanting(drawn: Sequence[Gathered], draw: Draw, world: World) -> bool:
    """Whether this process, or one that learns with it, lacks groups with spread: all draw on together, so that their
    cursors stay together."""
    found = sum(int(spread(one.scores_B, draw.group).sum()) for one in drawn)
    return any(world.ranks.told(found < draw.prompts))


def _best(drawn: Sequence[Gathered], draw: Draw) -> Gathered:
    """As many groups as a round has: those with spread in the order they were drawn, then the others."""
    if len(drawn) == 1:
        return drawn[0]
    scores_B = torch.cat([one.scores_B for one in drawn])
    has_spread_G = spread(scores_B, draw.group)
    order_G = torch.argsort((~has_spread_G).int(), stable=True)[: draw.prompts]
    chosen_B = (order_G[:, None] * draw.group + torch.arange(draw.group, device=order_G.device)).flatten()
    prompts = [prompt for one in drawn for prompt in one.prompts]
    completions = [completion for one in drawn for completion in one.completions]
    rows = chosen_B.tolist()
    return Gathered(
        [prompts[row] for row in rows],
        [completions[row] for row in rows],
        Episodes.joined([one.episodes for one in drawn]).rows(chosen_B),
        scores_B[chosen_B],
        len(drawn) - 1,
    )
