"""`fledge align` as it is typed: its list, its plan, what it refuses in one line, and who may use what it makes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fledge import cli
from fledge.recipes.align import METHODS

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import align_world as world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.plant(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _indifferent() -> Iterator[None]:
    """A run switches deterministic algorithms on; other tests need not have them."""
    yield
    torch.use_deterministic_algorithms(False)


def fledge(folder: Path, *arguments: str) -> int:
    return cli.main(["align", *arguments, "--runs", str(folder / "runs")])


def dpo(folder: Path, *more: str) -> tuple[str, ...]:
    return ("dpo", "tiny:sft", "--data", str(folder / "pairs.jsonl"), *more)


def test_list_shows_every_method(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fledge(folder, "--list") == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == [method.name for method in METHODS]


def test_plan_shows_what_would_be_done_and_does_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fledge(folder, *dpo(folder, "--plan", "--lr", "0.5", "--set", "train.beta=0.3", "--seed", "7")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["train"]["beta"], plan["train"]["fit"]["lr"], plan["seed"]) == (0.3, 0.5, 7)
    assert not (folder / "runs" / "tiny-dpo").exists()


DPO = ("dpo", "tiny:sft", "--data", "PAIRS")
GRPO = ("grpo", "tiny:sft", "--data", "PAIRS")
SUMS = (*GRPO, "--verifier", "numeric_answer")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("dpo",), "which model?"),
        (("kt", "tiny:sft", "--data", "PAIRS"), "did you mean 'kto'?"),
        (("dpo", "tiny:nothing", "--data", "PAIRS"), "has no model 'nothing'"),
        (("dpo", "tiny:reward", "--data", "PAIRS"), "does not train"),
        (("dpo", "tiny:sft", "--data", "nowhere.jsonl"), "there is no such file"),
        (("dpo", "tiny:sft", "--data", "PAIRS", "--set", "train.bta=1"), "did you mean 'beta'?"),
        (("dpo", "tiny:sft", "--data", "PAIRS", "--set", "train.beta=-1"), "beta must be positive"),
        (("dpo", "tiny:sft", "--data", "PAIRS", "--lora", "0"), "rank"),
        (("dpo", "tiny:sft", "--data", "PAIRS", "--lr", "nan"), "lr"),
        (("grpo", "tiny:sft", "--data", "PAIRS", "--reward", "tiny:sft"), "gives no scores"),
        (("grpo", "tiny:sft", "--data", "PAIRS", "--reward", "tiny:reward=much"), "is no weight"),
        (("grpo", "tiny:sft", "--data", "PAIRS", "--verifier", "numeric"), "no verifier is called 'numeric'"),
        (("grpo", "tiny:sft", "--data", "PAIRS", "--verifier", "regex", "--verifier-options", "[]"), "JSON object"),
        (
            (*SUMS, "--verifier", "regex", "--verifier-options", '{"last_numbr": true}'),
            "'last_numbr' is no option of numeric_answer and regex; did you mean 'last_number'?",
        ),
        ((*GRPO, "--reward", "tiny:reward", "--verifier-options", "{}"), "name one with --verifier"),
        ((*GRPO, "--reward", "tiny:reward=nan"), "the reward 'tiny:reward' has the weight nan"),
        ((*GRPO, "--verifier", "regex=0"), "the reward 'regex' has the weight 0"),
        ((*DPO, "--seed", "-1"), "--seed -1: expected 0 to"),
        ((*DPO, "--set", "seed=-1"), "seed is -1: expected 0"),
        ((*GRPO, "--reward", "tiny:reward", "--set", "train.seed=-1"), "seed is -1: expected 0"),
        ((*DPO, "--name", ""), "'' cannot name a run"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_before_any_work(
    arguments: tuple[str, ...], complaint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(folder / "pairs.jsonl") if argument == "PAIRS" else argument for argument in arguments]
    assert fledge(folder, *given) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
    assert {path.name for path in (folder / "runs").iterdir()} <= {"tiny", "tiny-dpo"}


def test_each_verifier_is_told_the_options_that_it_knows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = json.dumps({"last_number": True, "pattern": "7"})
    sums = (str(folder / "sums.jsonl") if word == "PAIRS" else word for word in SUMS)
    assert fledge(folder, *sums, "--verifier", "regex=0.5", "--verifier-options", options, "--plan") == 0
    rewards = json.loads(capsys.readouterr().out)["rewards"]
    assert [part["options"] for part in rewards] == [{"last_number": True}, {"pattern": "7"}]


def test_what_it_makes_can_be_talked_with_by_its_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fledge(folder, *dpo(folder, "--set", "outcome.max_tokens=8", "--json")) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["event"] == "done"
    runs = ("--runs", str(folder / "runs"), "--max-tokens", "4")
    assert cli.main(["complete", "tiny-dpo", "do you", *runs]) == 0
    assert cli.main(["compare", "tiny:sft", "tiny-dpo:dpo", "--prompt", "do you like tea?", *runs]) == 0
