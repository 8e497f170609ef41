"""`fledge self-instruct` and `fledge constitution` as they are typed, with a real engine behind them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from fledge import cli
from fledge.commands.making import show_report

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import align_world as world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.plant(tmp_path_factory.mktemp("world"), positions=4096)


def fledge(folder: Path, *arguments: str) -> int:
    return cli.main([*arguments, "--runs", str(folder / "runs")])


SMALL = ("--limit", "4", "--set", "sampling.max_tokens=4", "--json")


def test_show_names_every_principle_and_rule_in_both_languages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["constitution", "show"]) == 0
    said = capsys.readouterr().out
    assert cli.main(["constitution", "show", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    for item in (*data["principles"], *data["rules"]):
        assert item["id"] in said
    assert data["principles"][0]["zh"]["compare"] in said
    assert data["hash"][:12] in said


def test_revise_label_and_rules_leave_files_and_a_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ("--prompts", str(folder / "prompts.jsonl"))
    for action, more in (
        ("revise", ("--revisions", "1", *SMALL)),
        ("label", ("--answer-tokens", "4", "--thinking", *SMALL)),
        ("rules", ("--answer-tokens", "4", "--rules", "on-topic", "--limit", "4", "--json")),
    ):
        out = tmp_path / action
        assert fledge(folder, "constitution", action, "tiny:sft", *prompts, "--out", str(out), *more) == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert events[-1]["event"] == "done"
        assert events[-1]["report"] == json.loads((out / "report.json").read_text())
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".jsonl"}
        assert fledge(folder, "constitution", action, "tiny:sft", *prompts, "--out", str(out), *more) == 0
        capsys.readouterr()
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".jsonl"} == before


def test_a_next_step_is_told_only_where_there_is_something_to_learn_from(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answered = {"prompt": "do you like tea?", "completion": "yes i do", "label": True}
    one = world.write_rows(tmp_path / "one.jsonl", [answered])
    small = ("--rules", "on-topic", "--answer-tokens", "4")
    judged = ("constitution", "rules", "tiny:sft", "--prompts", str(one), "--out", str(tmp_path / "rules"), *small)
    assert fledge(folder, *judged) == 0
    said = capsys.readouterr().out
    assert "nothing came of it" in said, "one verdict is no ranking, and KTO wants both kinds"
    assert "fledge align" not in said
    pairs = ("--prompts", str(folder / "pairs.jsonl"), "--limit", "2")
    assert fledge(folder, "constitution", "label", "tiny:sft", *pairs, "--out", str(tmp_path / "labels")) == 0
    said = capsys.readouterr().out
    assert f"fledge align dpo tiny:sft --data {tmp_path / 'labels' / 'labels.jsonl'}" in said
    assert "nothing came of it" not in said


def test_of_several_next_steps_those_without_examples_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    show_report(Namespace(as_json=False), {"rankings": 0}, {}, [(0, "learn from rankings"), (3, "learn from verdicts")])
    said = capsys.readouterr().out
    assert "learn from verdicts" in said
    assert "learn from rankings" not in said


def test_agreement_reads_labels_of_people_and_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"type": "pair", "prompt": "how?", "completions": ["so", "thus"]}
    rows = [
        {
            **row,
            "prompt": f"how {n}?",
            "kind": kind,
            "labeler": who,
            "completions": ["so", "thus"][:: 1 if n else order],
        }
        for n in range(4)
        for kind, who, order in (("human", "ann", 1), ("ai", "m", -1))
    ]
    file = world.write_rows(tmp_path / "labels.jsonl", rows)
    assert cli.main(["constitution", "agreement", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreement_human_ai"] == 0.75
    assert cli.main(["constitution", "agreement", str(file)]) == 0
    said = capsys.readouterr().out
    assert "human and AI labels agree    75.0%" in said
    assert "people with one another      not measured" in said
    assert cli.main(["constitution", "agreement", str(file), "--seed", "-1"]) == 2
    assert "--seed -1: expected 0 or more" in capsys.readouterr().err
    assert cli.main(["constitution", "agreement", str(world.write_rows(tmp_path / "one.jsonl", rows[:1]))]) == 2
    assert "none judged by two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("self-instruct", "tiny:sft", "--out", "OUT", "--seeds", "nowhere.jsonl"), "nowhere.jsonl"),
        (("self-instruct", "tiny:none", "--out", "OUT"), "has no model 'none'"),
        (("self-instruct", "tiny:sft", "--out", "OUT", "--target", "0"), "counts of 1 or more"),
        (("self-instruct", "tiny:sft", "--out", "OUT", "--set", "tarket=3"), "did you mean 'target'?"),
        (("constitution", "revise", "tiny:sft", "--out", "OUT", "--prompts", "nowhere.jsonl"), "nowhere.jsonl"),
        (("constitution", "rules", "tiny:sft", "--out", "OUT", "--prompts", "PROMPTS", "--rules", "x"), "no rule 'x'"),
        (("constitution", "label", "tiny:sft", "--out", "OUT", "--prompts", "PROMPTS", "--limit", "0"), "--limit 0"),
        (("self-instruct", "tiny:sft", "--out", "OUT", "--seed", "-1"), "seed is -1: expected 0 or more"),
        (("constitution", "revise", "tiny:sft", "--out", "OUT", "--prompts", "PROMPTS", "--seed", "-1"), "seed is -1"),
        (("constitution", "label", "tiny:sft", "--out", "OUT", "--prompts", "PROMPTS", "--seed", "-1"), "seed is -1"),
        (("constitution", "rules", "tiny:sft", "--out", "OUT", "--prompts", "PROMPTS", "--seed", "-1"), "seed is -1"),
        (
            ("constitution", "revise", "tiny:sft", "--out", "OUT", "--prompts", "PROMPTS", "--constitution", "no.json"),
            "cannot be read as a constitution",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    arguments: tuple[str, ...], complaint: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"OUT": str(tmp_path / "out"), "PROMPTS": str(folder / "prompts.jsonl")}
    small = ("--answer-tokens", "2") if "--rules" in arguments else ()
    assert fledge(folder, *(places.get(argument, argument) for argument in arguments), *small) == 2
    said = capsys.readouterr().err
    assert complaint in said.splitlines()[-1]


@pytest.mark.parametrize("action", ["revise", "label", "rules"])
def test_a_prompt_too_long_for_the_model_is_a_bad_row_refused_by_its_place_or_counted(
    action: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "do you like tea?"}, {"prompt": "do you like tea? " * 1500}]
    file, out = world.write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    few = ("--revisions", "1", "--set", "sampling.max_tokens=4") if action == "revise" else ("--answer-tokens", "4")
    words = ("constitution", action, "tiny:sft", "--prompts", str(file), "--out", str(out), *few)
    assert fledge(folder, *words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "rows.jsonl:2: too long: it has" in said
    assert "4096; shorten or drop the row" in said
    assert not list(out.glob("*.jsonl")), "nothing was asked"
    assert fledge(folder, *words, "--skip-bad") == 0
    report = json.loads((out / "report.json").read_text())
    assert "too long" in json.dumps(report["rows skipped"])
    only = world.write_rows(tmp_path / "only.jsonl", rows[1:])
    words = ("constitution", action, "tiny:sft", "--prompts", str(only), "--out", str(out), *few)
    assert fledge(folder, *words, "--skip-bad") == 2
    assert "all 1 prompts are too long" in capsys.readouterr().err


def test_an_unknown_rule_is_refused_before_anything_is_asked(folder: Path, tmp_path: Path) -> None:
    words = ("constitution", "rules", "tiny:sft", "--prompts", str(folder / "prompts.jsonl"), "--rules", "nosuch")
    assert fledge(folder, *words, "--out", str(tmp_path / "out")) == 2
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_constitution_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.json").write_text("{}")
    words = ("constitution", "revise", "tiny:sft", "--prompts", str(folder / "prompts.jsonl"))
    assert fledge(folder, *words, "--out", str(tmp_path / "out"), "--constitution", str(tmp_path / "mine.json")) == 2
    assert "mine.json is no constitution (missing key 'name')" in capsys.readouterr().err


def made(folder: Path, out: Path) -> list[str]:
    """A command whose work takes some seconds: a model of noise, of whose tasks some happen to pass the filters."""
    start = [sys.executable, "-m", "fledge", "self-instruct", "tiny:sft", "--out", str(out)]
    sizes = ("propose.max_tokens=24", "answer.max_tokens=8", "patience=12", "requests=4", "batch=2")
    return [*start, "--target", "4", "--runs", str(folder / "runs"), *(word for s in sizes for word in ("--set", s))]


@pytest.mark.slow
def test_killed_at_any_moment_self_instruct_ends_with_the_same_files(folder: Path, tmp_path: Path) -> None:
    environment = world.environment(folder)
    subprocess.run(made(folder, tmp_path / "whole"), env=environment, check=True, capture_output=True)
    for seconds in (3.0, 3.5, 4.5, 6.0):
        process = subprocess.Popen(made(folder, tmp_path / "killed"), env=environment, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(made(folder, tmp_path / "killed"), env=environment, check=True, capture_output=True)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir() if not path.name.startswith("."))
    assert "tasks.jsonl" in names
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
