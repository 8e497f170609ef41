"""`fledge judge`: answers of models of several runs, sizes and tokenizers before one reward model."""

from __future__ import annotations

import json
from pathlib import Path

import align_world as world
import pytest

from fledge import cli
from fledge.errors import RunError, UserError
from fledge.recipes.judging import JudgeOrder, judged

QUESTIONS = tuple(world.questions()[:12])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`, and `large/runs/tiny` with another tokenizer and family."""
    folder = tmp_path_factory.mktemp("world")
    world.plant(folder)
    world.plant(folder / "large", vocab_size=320, family="llama")
    (folder / "large" / "runs" / "tiny").rename(folder / "runs" / "large")
    return folder / "runs"


def order(*models: str, judge: str = "tiny:gold", **changes: object) -> JudgeOrder:
    return JudgeOrder(judge, models, **{"questions": QUESTIONS, "max_tokens": 6, **changes})  # type: ignore[arg-type]


def test_a_model_ties_with_itself(runs: Path) -> None:
    (verdict,) = judged(order("tiny:sft", "tiny:sft"), runs)
    assert verdict.ours == verdict.theirs
    assert verdict.wins["win_rate"] == 0.5
    assert verdict.wins["ties"] == len(QUESTIONS)


def test_models_of_different_tokenizers_are_compared_by_what_they_say(runs: Path) -> None:
    (forth,) = judged(order("tiny:sft", "large:sft"), runs)
    (back,) = judged(order("large:sft", "tiny:sft"), runs)
    assert forth.ours.manners["answers"] == len(QUESTIONS)
    assert forth.wins["win_rate"] == pytest.approx(1 - back.wins["win_rate"])
    assert forth.wins["score_difference"] == pytest.approx(forth.ours.score - forth.theirs.score, abs=1e-5)
    assert forth.wins["win_rate_low"] <= forth.wins["win_rate"] <= forth.wins["win_rate_high"]
    assert forth.ours.parameters > forth.ours.matrix_parameters > 0


def test_the_first_model_is_set_against_each_of_the_others(runs: Path) -> None:
    found = judged(order("tiny:sft", "large:sft", "tiny:sft", limit=4), runs)
    assert [(verdict.ours.name, verdict.theirs.name) for verdict in found] == [
        ("tiny:sft", "large:sft"),
        ("tiny:sft", "tiny:sft"),
    ]
    assert found[0].wins["wins"] + found[0].wins["ties"] + found[0].wins["losses"] == 4


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        (order("tiny:sft"), "two models or more"),
        (order("tiny:sft", "large:sft", judge="tiny:sft"), "gives no scores"),
        (order("tiny:sft", "tiny:reward"), "gives no answers"),
        (order("tiny:sft", "large:sft", questions=()), "held-out chats"),
    ],
)
def test_what_cannot_be_judged_is_refused(runs: Path, wanted: JudgeOrder, complaint: str) -> None:
    with pytest.raises((UserError, RunError), match=complaint):
        judged(wanted, runs)


def test_the_command_tells_sizes_and_win_rates(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["judge", "tiny:gold", "tiny:sft", "large:sft", "--prompt", QUESTIONS[0], "--max-tokens", "4"]
    assert cli.main([*asked, "--runs", str(runs)]) == 0
    said = capsys.readouterr().out
    assert "tiny:sft" in said
    assert "times its size" in said
    assert "0, 1, 0" in said or "1, 0, 0" in said or "0, 0, 1" in said
    assert cli.main([*asked, "--runs", str(runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["theirs"]["name"] == "large:sft"
    assert 0 <= found["wins"]["win_rate"] <= 1


def test_an_empty_prompt_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["judge", "tiny:gold", "tiny:sft", "large:sft", "--prompt", " ", "--runs", str(runs)]) == 2
    assert "a prompt is empty" in capsys.readouterr().err
