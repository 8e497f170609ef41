"""Reward models of `fledge align`: one epoch unless asked, and the scale that their scores are left at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import align_world as world
import pytest

from fledge.formats.checkpoint import load_model
from fledge.models.scalar import ScalarModel
from fledge.recipes.align import AlignOrder, align, plan_of
from fledge.recipes.align_data import Cut, answer_ids
from fledge.recipes.answers import score_answers
from fledge.types import Conversation, Metrics


class Heard:
    """A listener that keeps what it is told of stages."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str, str]] = []

    def stage(self, name: str, status: str, note: str) -> None:
        self.notes.append((name, status, note))

    def step(self, stage: str, step: int, num_steps: int, metrics: Metrics) -> None:
        pass


def order(folder: Path, *overrides: str) -> AlignOrder:
    data = (folder / "rankings.jsonl",)
    return AlignOrder("reward", "tiny:sft", data, lr=1e-2, overrides=overrides, runs=folder / "runs")


def test_c16_reward_models_learn_for_one_epoch_and_more_is_warned_of(folder: Path) -> None:
    assert plan_of(order(folder)).train.fit.epochs == 1
    for epochs, warnings in ((1, 0), (2, 1)):
        heard = Heard()
        run = align(replace(order(folder, f"train.fit.epochs={epochs}"), name=f"epochs-{epochs}"), heard)
        told = [note for name, status, note in heard.notes if (name, status) == ("reward", "warning")]
        assert len(told) == warnings
        assert all("overfit beyond one epoch" in note for note in told)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert len([line for line in lines if line["stage"] == "reward"]) == epochs * 2


def test_c17_best_answers_average_zero_and_the_scale_is_stored_with_the_model(folder: Path) -> None:
    run = align(replace(order(folder), name="scaled"), Heard())
    loaded = load_model(run / "reward" / "model")
    assert isinstance(loaded.model, ScalarModel)
    cut = Cut(loaded.renderer, world.POSITIONS)
    best, everything = [], []
    for line in (run / "data" / "train.jsonl").read_text().splitlines():
        example = json.loads(line)["example"]
        prompt = Conversation.of(("user", example["prompt"]["messages"][0]["parts"][0]["text"]))
        answers = [answer_ids(cut, prompt, text) for text in example["completions"]]
        best.append(answers[example["ranks"].index(1)])
        everything += answers
    pad_id = loaded.tokenizer.pad_id
    assert abs(float(score_answers(loaded.model, best, pad_id).double().mean())) < 1e-3
    assert float(score_answers(loaded.model, everything, pad_id).double().std()) == pytest.approx(1, abs=1e-3)
