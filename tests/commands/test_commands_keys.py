"""`fledge keys` and what `fledge serve` does before it listens."""

from __future__ import annotations

import asyncio
import socket
from argparse import Namespace
from pathlib import Path

import pytest

from fledge.cli import main
from fledge.commands.serve import _first_key, _warm, bound, model_entries, moderation_of
from fledge.commands.serving import database_url
from fledge.errors import EngineDied, UserError
from fledge.serve.engine import ServedModel
from fledge.serve.hub import Hub, ModelEntry
from fledge.serve.loading import ProcessLoader
from fledge.store.database import Database
from fledge.store.keys import find_key, list_keys


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path))
    monkeypatch.delenv("FLEDGE_DATABASE_URL", raising=False)


def test_a_key_is_shown_once_listed_without_itself_and_revoked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "--owner", "alice", "--scopes", "generate,files", "--tokens-per-minute", "9"]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("sk-fledge-")

    async def owner() -> tuple[str | None, str]:
        database = Database(database_url())
        row = await find_key(database, key)
        keys = await list_keys(database)
        await database.close()
        return None if row is None else row.owner, keys[0].id

    found, key_id = asyncio.run(owner())
    assert found == "alice"
    assert main(["keys", "list"]) == 0
    assert key not in capsys.readouterr().out
    assert main(["keys", "revoke", key_id]) == 0
    assert asyncio.run(owner())[0] is None
    assert main(["keys", "revoke", key_id]) == 2


@pytest.mark.parametrize("wrong", [["--scopes", "root"], ["--requests-per-minute", "0"], ["--owner", ""]])
def test_a_key_that_makes_no_sense_is_one_line_and_exit_code_2(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "create", *wrong]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_first_key_makes_itself_on_this_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    async def start(host: str) -> None:
        database = Database(database_url())
        await database.open()
        try:
            await _first_key(database, host)
        finally:
            await database.close()

    with pytest.raises(UserError, match="fledge keys create"):
        asyncio.run(start("0.0.0.0"))
    asyncio.run(start("localhost"))
    assert "sk-fledge-" in capsys.readouterr().out
    asyncio.run(start("0.0.0.0"))
    asyncio.run(start("::1"))
    assert capsys.readouterr().out == ""


def test_models_and_aliases_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "run.json").write_text("{}")
    model = str(tmp_path / "m")
    entries = model_entries([model], [f"gpt-4o-mini={model}"], tmp_path)
    assert [(entry.name, entry.target) for entry in entries] == [(model, None), ("gpt-4o-mini", model)]
    for names, aliases in (([model], ["x"]), ([model], ["x=y"]), ([model, model], []), (["nope"], [])):
        with pytest.raises(UserError):
            model_entries(names, aliases, tmp_path)


@pytest.mark.parametrize("option", ["hate=0.5", "hat=0.5", "hate=nan", "hate=2", "hate"])
def test_a_threshold_without_a_model_or_a_meaning_is_refused(tmp_path: Path, option: str) -> None:
    args = Namespace(moderation=None, moderate=None, runs=tmp_path, threshold=[option])
    with pytest.raises(UserError) as caught:
        moderation_of(args, ProcessLoader())
    assert "\n" not in str(caught.value)


def test_an_address_that_cannot_be_had_is_refused_before_anything_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        for host, port, told in (
            ("127.0.0.1", taken, "another --port"),
            ("127.0.0.1", 70_000, "65535"),
            ("no-such-machine.invalid", 0, "--host"),
            ("a" * 300, 0, "--host"),
        ):
            with pytest.raises(UserError, match=told) as caught:
                bound(host, port)
            assert "\n" not in str(caught.value)
    with bound("127.0.0.1", 0) as found:
        assert found.getsockname()[1] > 0


def test_a_model_that_cannot_be_loaded_is_told_of_in_one_line(tmp_path: Path) -> None:
    class Refusing(ProcessLoader):
        async def load(self, name: str, path: Path) -> ServedModel:
            raise EngineDied("the device 'nonsense' is not there")

    async def warm() -> None:
        database = Database(database_url())
        await database.open()
        try:
            await _warm(Hub(database, Refusing(), [ModelEntry("mine", 0, "fledge", path=tmp_path)], None))
        finally:
            await database.close()

    with pytest.raises(UserError, match=r"^mine: the device 'nonsense' is not there$"):
        asyncio.run(warm())


@pytest.mark.parametrize("options", [["--threads", "0"], ["--threads", "-3"], ["--cache-mb", "0"], ["--port", "x"]])
def test_numbers_that_make_no_sense_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main(["serve", *options]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert options[0] in told
