from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path

import pytest

from fledge.cli import main

TEXT = "The weather is fine today. 今天天气很好。\n\ndef area(width, height):\n    return width * height\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{TEXT}\n{number}", encoding="utf-8")
    return tmp_path


def train(folder: Path, *more: str) -> int:
    out = str(folder / "t.json")
    return main(["tokenizer", "train", "--text", str(folder / "texts"), "--vocab", "600", "--out", out, *more])


def test_train_then_show_then_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder) == 0
    assert "sha256" in capsys.readouterr().out
    assert main(["tokenizer", "show", str(folder / "t.json"), "天气 is <|end|>", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert "".join(shown["pieces"]) == "天气 is <|end|>"
    assert len(shown["ids"]) == len(shown["pieces"])
    assert main(["tokenizer", "show", str(folder / "t.json"), "a\nb"]) == 0
    assert "a|\\n|b" in capsys.readouterr().out
    arguments = [
        "tokenizer",
        "report",
        str(folder / "t.json"),
        "--text",
        str(folder / "texts"),
        "--without-gpt2",
        "--json",
    ]
    assert main(arguments) == 0
    (figure,) = json.loads(capsys.readouterr().out).values()
    assert figure > 1.5


def test_show_reads_standard_input_and_refuses_what_is_no_text(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(folder) == 0
    for piped, code in (("天气".encode(), 0), (b"a\xff", 2)):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
        assert main(["tokenizer", "show", str(folder / "t.json"), "-"]) == code
    assert capsys.readouterr().err == "fledge: standard input: not UTF-8 at byte 1; convert it first\n"


def test_a_file_that_exists_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "t.json").write_text("mine")
    assert train(folder) == 2
    assert "exists already" in capsys.readouterr().err
    assert (folder / "t.json").read_text() == "mine"


def test_files_that_cannot_be_used_are_left_out_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "texts" / "binary.txt").write_bytes(b"\x00\x01\x02")
    (folder / "texts" / "half.jsonl").write_text('{"text": "half \\ud800"}\n')
    assert train(folder) == 0
    complaints = capsys.readouterr().err
    assert "binary.txt" in complaints
    assert "half.jsonl" in complaints


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train", "--out", "t.json"], "no text to learn from"),
        (["train", "--text", "absent", "--out", "t.json"], "absent"),
        (["train", "--source", "wikipedai", "--out", "t.json"], "did you mean 'wikipedia'"),
        (["train", "--text", "texts", "--out", "t.json", "--vocab", "9"], "too small"),
        (["train", "--text", "texts", "--out", "t.json", "--kind", "words"], "words"),
        (["show", "no-such-run", "hi"], "no-such-run"),
        (["report", "texts/0.txt"], "0.txt"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(folder)
    assert main(["tokenizer", *arguments]) == 2
    line = capsys.readouterr().err
    assert complaint in line
    assert line.count("\n") == 1
    assert not (folder / "t.json").exists()


def test_training_tells_its_progress_and_its_result_as_json_lines(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "texts" / "binary.txt").write_bytes(b"\x00\x01\x02")
    assert train(folder, "--json") == 0
    said = capsys.readouterr()
    assert said.err == ""
    *events, done = map(json.loads, said.out.splitlines())
    assert [event.get("status") or event["step"] for event in events] == ["reading", 1, "learning"]
    assert done["file"] == str(folder / "t.json")
    assert done["vocabulary"] <= 600
    assert done["sha256"] == hashlib.sha256((folder / "t.json").read_bytes()).hexdigest()
    assert sum(facts["count"] for facts in done["left_out"].values()) == 1
