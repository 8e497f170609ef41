"""Wrong input at the command line: one line that names what is wrong and the way out, exit code 2, no traceback."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fledge.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]

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
    (["raise", "pocket", "--set", "model.widht=12"], "did you mean 'width'"),
    (["raise", "pocket", "--set", "model.max_positions=100"], "pretrain.fit.row_length is 128"),
    (
        ["raise", "pocket", "--set", "model.max_positions=128", "--set", "ppo.response_length=80"],
        "response_length is 136",
    ),
    (["raise", "pocket", "--set", "family=ngram"], "cannot be raised"),
    (["raise", "pocket", "--set", 'corpus.prose=["wikipedja"]'], "did you mean 'wikipedia'"),
    (["raise", "pocket", "--set", 'corpus.prose=["chitchat"]'], "'chitchat' holds no documents"),
    (["raise", "pocket", "--set", 'corpus.chats=["hsk"]'], "'hsk' holds no conversations"),
    (["raise", "pocket", "--set", "corpus.limits.recipies=5"], "did you mean 'recipes'"),
    (["raise", "pocket", "--set", "corpus.limits.recipes=0"], "corpus.limits.recipes is 0"),
    (["raise", "pocket", "--set", 'evaluation.benchmarks=["piqua"]'], "unknown benchmark 'piqua'"),
    (["raise", "pocket", "--text", "no/such/folder"], "no/such/folder"),
    (["raise", "pocket", "--text", "."], "no text in it"),
    (
        ["raise", "pocket", "--text", "~no-such-user/notes"],
        "notes: Could not determine home directory; check the path",
    ),
    (["raise", "pocket", "--set", "depth=6"], "--set depth: it only says what was asked for; give --depth"),
    (["raise", "pocket", "--set", "recipe=fledgling"], "name another recipe"),
    (["raise", "pocket", "--set", "corpus.text=notes"], "give --text"),
    (["raise", "pocket", "--set", "pretrain.fit.lanes=0"], "pretrain.fit.lanes: lanes is 0: expected 1 or more"),
    (["raise", "pocket", "--set", "ppo.temperature=0"], "ppo: temperature is 0.0"),
    (["raise", "pocket", "--frobnicate"], "--frobnicate; see `fledge raise --help`"),
    (["raise", "pocket", "--dept", "3"], "--dept"),
    (["data", "list", "--js"], "--js"),
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


@pytest.mark.parametrize(("name", "spins"), [("chat", True), ("serve", True), ("align", False)])
def test_threads_spin_only_where_somebody_waits_for_every_token(
    name: str, spins: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    main([name, "--no-such-option"])
    assert os.environ["GOMP_SPINCOUNT"] == "7"  # the user's word goes before ours
    monkeypatch.delenv("GOMP_SPINCOUNT")
    main([name, "--no-such-option"])
    assert ("GOMP_SPINCOUNT" not in os.environ) is spins
    os.environ.pop("GOMP_SPINCOUNT", None)


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["raise", "--list"]) == 0
    assert {"sprout", "pocket", "fledgling"} <= set(capsys.readouterr().out.split())


def test_a_full_disk_that_nobody_explained_is_told_with_a_way_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/pocket/sft")

    monkeypatch.setattr("fledge.commands.models.run", full)
    assert main(["models"]) == 2
    assert capsys.readouterr().err == (
        "fledge: runs/pocket/sft: No space left on device; free some space and run the same command again\n"
    )


def test_ctrl_c_before_anybody_listens_is_told_in_a_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("fledge.commands.models.run", stopped)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "fledge: stopped\n"


def test_a_terminal_that_lacks_a_character_shows_another_and_no_traceback() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "COLUMNS": "120"}
    line = [sys.executable, "-m", "fledge", "data", "list"]
    done = subprocess.run(line, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"the novel ????" in done.stdout


def test_links_in_a_circle_are_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one").symlink_to("two")
    Path("two").symlink_to("one")
    assert main(["raise", "pocket", "--text", "one"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("fledge: --text one: ")
    assert complaint.count("\n") == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_environment_whose_making_was_killed_is_made_again(tmp_path: Path) -> None:
    """`python -m venv` puts the interpreter there first, and pip seconds later."""
    venv, maker = tmp_path / "venv", tmp_path / "maker"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").write_text("#!/bin/sh\nexit 1\n")
    maker.write_text(
        f'#!/bin/sh\ntest "$*" = "-m venv {venv}" || exit 9\n'
        f"echo '#!/bin/sh' > {venv}/bin/python\necho 'echo \"$*\" >> {tmp_path}/asked' >> {venv}/bin/python\n"
    )
    for program in (venv / "bin/python", maker):
        program.chmod(0o755)
    line = ["make", "-C", str(ROOT), "setup", f"VENV={venv}", f"PYTHON={maker}"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "asked").read_text().startswith("-m pip install")
    assert (venv / ".ready").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_up_talks_with_the_run_that_was_raised_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "fledge").write_text(
        '#!/bin/sh\ntest "$*" = "raise pocket" || exit 9\necho "note" >&2\n'
        'echo "raised pocket-2: its card is runs/pocket-2/card.html; talk with it: fledge chat pocket-2"\n'
    )
    (tmp_path / "fledge").chmod(0o755)
    (tmp_path / "ready").touch()
    line = ["make", "-C", str(ROOT), "up", f"BIN={tmp_path}", f"READY={tmp_path / 'ready'}"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "raised pocket-2" in done.stdout
    assert f"Chat with it in a terminal: {tmp_path}/fledge chat pocket-2\n" in done.stdout
    (tmp_path / "fledge").write_text("#!/bin/sh\nexit 130\n")
    done = subprocess.run(line, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode != 0
    assert "Chat with it" not in done.stdout
