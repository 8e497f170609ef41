"""Wrong input at the command line: one line that names what is wrong and the way out, exit code 2, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.cli import COMMANDS, main

WRONG = [
    (["rase"], "did you mean 'raise'"),
    (["raise"], "which recipe"),
    (["raise", "poket"], "did you mean 'pocket'"),
    (["raise", "pocket", "--depth", "0"], "--depth 0"),
    (["raise", "pocket", "--depth", "x"], "--depth"),
    (["raise", "pocket", "--set", "seeed=1"], "did you mean 'seed'"),
    (["raise", "pocket", "--set", "seed=one"], "expected int"),
    (["raise", "pocket", "--set", "ppo.kl.target=-1"], "positive"),
    (["raise", "pocket", "--set", "seed"], "key=value"),
    (["raise", "pocket", "--set", "ppo=1"], "is a group"),
    (["raise", "pocket", "--text", "no/such/folder"], "no/such/folder"),
    (["raise", "pocket", "--text", "."], "no text in it"),
    (["raise", "pocket", "--frobnicate"], "--frobnicate"),
    (["raise", "pocket", "--name", "../outside"], "cannot name a run"),
    (["chat", "nobody"], "nobody"),
    (["complete", "nobody:ppo", "text"], "nobody"),
    (["compare", "nobody:sft", "nobody:ppo", "--prompt", "hi"], "nobody"),
    (["eval", "nobody"], "nobody"),
    (["card", "nobody"], "nobody"),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_input_is_told_in_one_line(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    complaint = capsys.readouterr().err
    assert named in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", [name for name, _, _ in COMMANDS])
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"fledge {name}" in capsys.readouterr().out


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["raise", "--list"]) == 0
    assert {"sprout", "pocket", "fledgling"} <= set(capsys.readouterr().out.split())
