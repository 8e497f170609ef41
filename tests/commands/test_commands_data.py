"""`fledge data`: the catalogue, examples and yields, and errors in one line with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fledge.cli import main
from fledge.data.corpus import Ingredient, write_corpus


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path / "home"))
    (tmp_path / "mine").mkdir()
    for number in range(30):
        (tmp_path / "mine" / f"{number}.txt").write_text(f"the text [bold] number {number} " * 60)
    return tmp_path / "mine"


def test_the_list_names_every_source_and_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("wikipedia-fr", "stdlib", "chatterbot-zh", "piqa", "CC BY-SA"))
    assert main(["data", "list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["name"] == "wikipedia"


def test_examples_of_a_folder_are_shown_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(folder), "--limit", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("the user's own") == 2
    assert "[bold]" in said
    assert "characters]" in said
    assert main(["data", "show", str(folder), "--limit", "1", "--full"]) == 0
    assert "characters]" not in capsys.readouterr().out


def test_stats_say_what_is_kept_and_why_the_rest_is_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "b.txt").write_bytes(b"\0")
    (folder / "c.png").write_bytes(b"")
    assert main(["data", "stats", str(folder)]) == 2
    assert "NUL byte" in capsys.readouterr().err
    assert main(["data", "stats", str(folder), "--skip-bad", "--json"]) == 0
    account = next(iter(json.loads(capsys.readouterr().out).values()))
    assert sum(account["kept"].values()) == 30
    assert {reason: facts["count"] for reason, facts in account["unusable"].items()} == {
        "not a text file by its name": 1,
        "file that cannot be used": 1,
    }
    corpus = folder.parent / "corpus"
    write_corpus([Ingredient("mine", str(folder), skip_bad=True)], corpus, cache=folder, seed=0)
    assert main(["data", "stats", str(corpus)]) == 0
    assert "kept for train" in capsys.readouterr().out
    assert main(["data", "show", str(corpus), "--limit", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["show", "wikipedja"], "did you mean 'wikipedia'?"),
        (["fetch", "piqua"], "did you mean 'piqa'?"),
        (["stats", "/nowhere/at/all"], "neither a path nor a source"),
        (["show", "hsk", "--limit", "0"], "expected a whole number from 1 on, got 0"),
        ([], "required"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert main(["data", *arguments]) == 2
    said = capsys.readouterr().err
    assert part in said
    assert said.count("\n") == 1


def test_nothing_is_fetched_for_what_is_on_the_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fetch", "stdlib"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out


def test_what_was_fetched_is_told_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fetch", "stdlib", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "stdlib", "file": None, "bytes": None}
