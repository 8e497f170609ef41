"""Which weights an RL run keeps (C59): a judge decides that no reward is, and never what was trained against."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import align_memory
import pytest
import torch
from align_world import Silent

from fledge.errors import ConfigError
from fledge.files import sha256_file
from fledge.recipes.align import AlignOrder, align, plan_of

SHORT = (
    *("train.prompt_length=30", "train.response_length=8", "outcome.max_tokens=8", "outcome.prompts=2"),
    *("train.warmup_rounds=1", "train.minibatch=16", "train.prompts=4", "train.group=4"),
)


def order(folder: Path, *overrides: str, **others: Any) -> AlignOrder:
    given = {"rewards": (("tiny:reward", 1.0),), "lr": 1e-2, "runs": folder / "runs", **others}
    return AlignOrder("grpo", "tiny:sft", (folder / "prompts.jsonl",), overrides=(*SHORT, *overrides), **given)


def weights(run: Path) -> str:
    return sha256_file(run / "grpo" / "model" / "model.safetensors")


def test_c59_weights_are_chosen_by_the_judge_however_high_the_reward_rises(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gold = iter((0.0, 0.1, 0.9, 0.5, 0.2))  # the start, then each round
    monkeypatch.setattr("fledge.recipes.align_gold.score_answers", lambda *_: torch.tensor([next(gold)]))
    judged = align(order(folder, "train.rounds=6", "judge.every=1", judge="tiny:gold", name="judged"), Silent())
    best = align(order(folder, "train.rounds=2", name="two"), Silent())
    last = align(order(folder, "train.rounds=4", name="four"), Silent())
    assert weights(judged) == weights(best) != weights(last)


def test_c59_a_reward_under_another_name_is_no_judge(folder: Path) -> None:
    shutil.copytree(folder / "runs" / "tiny" / "reward", folder / "runs" / "tiny" / "disguised")
    with pytest.raises(ConfigError, match="has the weights of a reward"):
        plan_of(replace(order(folder), judge="tiny:disguised"))
    with pytest.raises(ConfigError, match="trained against"):
        plan_of(replace(order(folder), judge="tiny:reward"))
    assert plan_of(replace(order(folder), judge="tiny:gold")).judge is not None


@pytest.mark.slow
def test_ppo_of_30_million_parameters_with_all_its_networks_stays_under_3_gib(tmp_path: Path) -> None:
    found = align_memory.measure(tmp_path)
    assert 28e6 < found["parameters"] < 33e6
    assert found["peak_rss_bytes"] < 3 * 2**30, found
