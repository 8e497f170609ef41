"""Reinforcement learning in two real processes, joined by gloo: what they share is what one process would have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rl_ranks
import torch
from safetensors.torch import load_file
from torch import Tensor

from fledge.errors import ConfigError
from fledge.rl.prompts import RANK_STRIDE, draw_prompts, seed_of
from fledge.train.parallel import ALONE, Ranks

SHARED = ("ppo-shared", "grpo-shared")


@pytest.fixture(scope="module")
def two(in_processes, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes told, its weights among it."""
    folder = tmp_path_factory.mktemp("ranks")
    in_processes(Path(rl_ranks.__file__), folder)
    found = [json.loads((folder / f"told-{number}.json").read_text()) for number in range(2)]
    for number, told in enumerate(found):
        for name, tensor in load_file(folder / f"weights-{number}.safetensors").items():
            run, _, rest = name.partition("/")
            told[run].setdefault("weights", {})[rest] = tensor
    return found


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, Any]]:
    """The same runs in a single process."""
    return rl_ranks.shared_runs(ALONE)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> bool:
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) <= tolerance


@pytest.mark.parametrize("run", SHARED)
def test_c44_weights_and_figures_after_two_rounds_do_not_depend_on_the_number_of_processes(run, two, one):
    """Clipped gradients, token means, pretraining rows, adaptive price, average: all of the whole batch."""
    for told in two:
        found, expected = told[run], one[run]
        assert found["prompts"] == expected["prompts"]
        assert found["answers"] == expected["answers"]
        assert found["texts"] == expected["texts"]
        for ours, theirs in zip(found["metrics"], expected["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
            assert ours["ratio_gap"] <= 1e-5
        assert found["scalars"]["beta"] == pytest.approx(expected["scalars"]["beta"], rel=1e-6)
        moments = found["scalars"]["moments"]
        assert moments == pytest.approx(expected["scalars"]["moments"], rel=1e-6)
        assert close(found["weights"], expected["weights"], 1e-5)


@pytest.mark.parametrize("run", [*SHARED, "ppo-own", "grpo-own"])
def test_all_processes_end_with_the_same_weights_and_figures_to_the_bit(run, two):
    first, second = (told[run] for told in two)
    assert first["metrics"] == second["metrics"]
    assert first["scalars"] == second["scalars"]
    assert first["answers"] == second["answers"]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])


def test_c31_advantages_are_whitened_over_the_episodes_of_all_processes(two, one):
    ours, theirs = two[0]["ppo-shared"], one["ppo-shared"]
    for number in range(rl_ranks.ROUNDS):
        found, mask = torch.tensor(ours["advantages"][number]), torch.tensor(ours["masks"][number])
        assert torch.allclose(found, torch.tensor(theirs["advantages"][number]), atol=1e-5)
        actions = found[mask > 0]
        assert float(actions.mean()) == pytest.approx(0, abs=1e-5)
        assert float(actions.std(correction=0)) == pytest.approx(1, abs=1e-3)
        shares = [half[part > 0] for half, part in zip(found.chunk(2), mask.chunk(2), strict=True)]
        assert max(abs(float(share.mean())) for share in shares) > 0.01, "each process's own mean is another"


def test_c24_processes_draw_other_prompts_with_other_noise_and_a_run_is_reproducible_to_the_bit(two):
    own, again = two[0]["ppo-own"], two[0]["ppo-again"]
    prompts = rl_ranks.PROMPTS
    for number in range(len(own["prompts"])):
        drawn = [draw_prompts(len(prompts), 8, seed=0, number=number, rank=rank, num_ranks=2) for rank in range(2)]
        assert not set(drawn[0]) & set(drawn[1])
        assert own["prompts"][number] == [list(prompts[place]) for places in drawn for place in places]
        assert len(own["answers"][number]) == rl_ranks.PPO_CONFIG.episodes
    assert own["answers"] == again["answers"]
    assert own["metrics"] == again["metrics"]
    assert all(torch.equal(own["weights"][name], again["weights"][name]) for name in own["weights"])


def test_c24_the_seed_of_a_process_is_the_seed_plus_its_number_times_100003():
    assert RANK_STRIDE == 100_003
    assert seed_of("sampling", 7, 3, rank=2) == seed_of("sampling", 7 + 2 * 100_003, 3)
    assert len({seed_of("sampling", 7, 3, rank=rank) for rank in range(8)}) == 8


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_c24_answers_to_one_prompt_differ_between_processes(method, two):
    first, second = (told["alike"][method] for told in two)
    assert len(first) == len(second) == 8
    assert first != second


def test_c53_processes_draw_further_groups_together_so_that_no_prompt_is_asked_twice(two):
    first, second = (told["grpo-own"] for told in two)
    assert first["scalars"]["draws"] == second["scalars"]["draws"] > rl_ranks.ROUNDS, "or nothing was drawn again"
    assert [told["draws"] for told in two] == [3, 3], "who has enough draws on beside who has not"
    assert sum(metrics["redraws"] for metrics in first["metrics"]) == first["scalars"]["draws"] - rl_ranks.ROUNDS


def test_processes_that_start_from_different_weights_are_refused(two):
    assert all("start from different weights" in told["refusals"]["weights"] for told in two)


def test_c49_what_is_no_number_in_one_process_halts_all_and_each_leaves_the_batch(two):
    for number, told in enumerate(two):
        said = told["refusals"]["infinite"]
        assert "a score is not a finite number" in said
        path = Path(said.rpartition("batch in ")[2])
        assert path.name == f"halted-0-rollout-of-process-{number}.safetensors"
        assert len(load_file(path)["0.tokens_BT"]) == rl_ranks.PPO_CONFIG.episodes


def test_shares_that_do_not_come_out_even_are_refused():
    with pytest.raises(ConfigError, match="episodes 16 is no multiple of the 3 processes"):
        rl_ranks.ppo_of(Ranks(0, 3))
    with pytest.raises(ConfigError, match="prompts 4 is no multiple of the 3 processes"):
        rl_ranks.grpo_of(Ranks(0, 3))
