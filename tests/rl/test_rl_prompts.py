"""Drawing prompts: every one once a lap, other ones on other processes, the same again after a resumption."""

from __future__ import annotations

import pytest
import torch

from fledge.rl.prompts import draw_prompts, generator_of, seed_of


def test_every_prompt_is_drawn_once_before_any_is_drawn_again():
    drawn = [index for number in range(7) for index in draw_prompts(10, 4, seed=3, number=number)]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert drawn[:10] != drawn[10:20], "each lap has an order of its own"


def test_c24_different_processes_draw_different_prompts_and_different_noise():
    ranks = [draw_prompts(100, 8, seed=3, number=2, rank=rank, num_ranks=3) for rank in range(3)]
    assert len({index for drawn in ranks for index in drawn}) == 24
    together = draw_prompts(100, 24, seed=3, number=2)
    assert [index for drawn in ranks for index in drawn] == together
    assert len({seed_of("sampling", 3, 2, rank) for rank in range(3)}) == 3
    assert seed_of("sampling", 3, 2, rank=2) == seed_of("sampling", 3 + 2 * 100_003, 2)


def test_c24_draws_depend_on_seed_round_and_purpose_alone():
    assert draw_prompts(50, 8, seed=3, number=5) == draw_prompts(50, 8, seed=3, number=5)
    assert draw_prompts(50, 8, seed=3, number=5) != draw_prompts(50, 8, seed=4, number=5)
    a, b = (torch.rand(3, generator=generator_of("sampling", 1, 2)) for _ in range(2))
    assert torch.equal(a, b)
    seeds = {
        seed_of(purpose, seed, number)
        for purpose in ("prompts", "sampling", "minibatches")
        for seed in range(3)
        for number in range(3)
    }
    assert len(seeds) == 27


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        draw_prompts(0, 4, seed=0, number=0)
