"""The store on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from fledge.errors import ConfigError, RunError, UserError
from fledge.store import completions, files, jobs, keys, models, responses
from fledge.store.blobs import Blobs
from fledge.store.database import Database, sqlite_url
from fledge.store.pages import Cursor, UnknownCursor, new_id, now
from fledge.store.tables import Base, CompletionRow, ResponseRow

pytestmark = pytest.mark.anyio


async def test_migrations_make_the_tables_that_the_code_maps(database: Database) -> None:
    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), Base.metadata))

    async with database.reading() as session:
        assert await (await session.connection()).run_sync(differences) == []


async def test_opening_twice_at_once_migrates_once(tmp_path: Path) -> None:
    databases = [Database(sqlite_url(tmp_path / "a.db")) for _ in range(4)]
    await asyncio.gather(*(database.open() for database in databases))
    for database in databases:
        await database.close()


async def test_a_database_of_a_newer_fledge_is_refused(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "a.db"))
    await database.open()
    async with database.writing() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RunError, match="newer fledge"):
        await database.open()
    await database.close()


@pytest.mark.parametrize("url", ["mysql://x/y", "no url at all"])
def test_other_databases_are_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigError, match="postgresql://"):
        Database(url)


async def test_a_writing_block_that_fails_changes_nothing(database: Database) -> None:

    async def fail() -> None:
        async with database.writing() as session:
            session.add(_completion("chatcmpl-1"))
            await session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await completions.find_completion(database, "alice", "chatcmpl-1") is None


async def test_writers_wait_for_each_other(database: Database) -> None:
    """Two that read and then write never meet a lock that they cannot wait for."""
    row = (await keys.create_key(database, keys.KeyRequest("alice")))[1]

    async def bump() -> None:
        async with database.writing() as session:
            found = await session.get(keys.KeyRow, row.seq, with_for_update=True)
            assert found is not None
            before = found.requests_per_minute or 0
            await asyncio.sleep(0)
            found.requests_per_minute = before + 1

    await asyncio.gather(*(bump() for _ in range(20)))
    assert (await keys.list_keys(database))[0].requests_per_minute == 20


async def test_a_key_is_found_until_it_is_revoked_and_never_stored(database: Database) -> None:
    key, row = await keys.create_key(database, keys.KeyRequest("alice", scopes=("files",)))
    assert key not in str(vars(row))
    found = await keys.find_key(database, key)
    assert found is not None
    assert (found.owner, found.scopes) == ("alice", ["files"])
    assert await keys.find_key(database, key + "x") is None
    assert await keys.revoke_key(database, row.id)
    assert not await keys.revoke_key(database, row.id)
    assert await keys.find_key(database, key) is None


@pytest.mark.parametrize("wrong", [{"scopes": ["root"]}, {"scopes": []}, {"tokens_per_minute": 0}, {"owner": ""}])
def test_a_key_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError):
        keys.KeyRequest(**{"owner": "alice", **wrong})  # type: ignore[arg-type]


async def test_models_are_their_owners_or_everybodys(database: Database) -> None:
    await models.register_model(database, "mine", owner="alice", path="a")
    await models.register_model(database, "all", owner=None, target="mine")
    assert await models.find_model(database, "bob", "mine") is None
    assert [row.id for row in await models.list_models(database, "bob")] == ["all"]
    assert not await models.delete_model(database, "bob", "mine")
    assert not await models.delete_model(database, "bob", "all")
    assert await models.delete_model(database, "alice", "mine")
    assert not await models.delete_model(database, "alice", "mine")


async def test_equal_contents_are_kept_once_and_go_with_the_last_file(database: Database, tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    rows = [await _upload(database, blobs, b"same", f"../../{name}\0") for name in ("a", "b")]
    assert rows[0].sha256 == rows[1].sha256
    assert [path.name for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == [rows[0].sha256]
    assert not await files.delete_file(database, blobs, "bob", rows[0].id)
    assert await files.delete_file(database, blobs, "alice", rows[0].id)
    assert blobs.read(rows[1].sha256) == b"same"
    assert await files.delete_file(database, blobs, "alice", rows[1].id)
    assert not blobs.path(rows[1].sha256).exists()


async def test_an_expired_file_is_gone_at_once_and_swept_later(database: Database, tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    row = await _upload(database, blobs, b"old", "a", expires_at=now() - 1)
    assert await files.find_file(database, "alice", row.id) is None
    assert await files.sweep_expired(database, blobs) == 1
    assert not blobs.path(row.sha256).exists()


async def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)

    def fail() -> None:
        with blobs.writer() as writer:
            writer.write(b"half")
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert list(tmp_path.iterdir()) == []


async def test_pages_go_through_a_list_in_both_orders(database: Database) -> None:
    for i in range(5):
        await completions.add_completion(database, _completion(f"c{i}", labels={"even": str(i % 2 == 0)}))

    async def page(cursor: Cursor, labels: dict[str, str] | None = None) -> tuple[list[str], bool]:
        found = await completions.list_completions(database, "alice", None, labels or {}, cursor)
        return [row.id for row in found.rows], found.has_more

    assert await page(Cursor(2)) == (["c0", "c1"], True)
    assert await page(Cursor(2, after="c2")) == (["c3", "c4"], False)
    assert await page(Cursor(2, "desc", after="c2")) == (["c1", "c0"], False)
    assert await page(Cursor(), {"even": "True"}) == (["c0", "c2", "c4"], False)
    assert await page(Cursor(), {"it's; DROP TABLE": "x"}) == ([], False)
    with pytest.raises(UnknownCursor):
        await page(Cursor(after="nope"))
    with pytest.raises(UserError):
        await page(Cursor(), {'"': "x"})


async def test_nobody_sees_anothers_rows(database: Database) -> None:
    await completions.add_completion(database, _completion("c0"))
    await responses.add_response(database, _response("r0"))
    await jobs.add_job(database, "j0", "alice", "chat")
    assert await completions.find_completion(database, "bob", "c0") is None
    assert await completions.label_completion(database, "bob", "c0", {}) is None
    assert not await completions.delete_completion(database, "bob", "c0")
    assert await responses.find_response(database, "bob", "r0") is None
    assert await responses.update_response(database, "bob", "r0", {"status": "failed"}) is None
    assert not await responses.delete_response(database, "bob", "r0")
    assert await jobs.read_events(database, "bob", "j0", 0) is None
    assert not await jobs.want_cancelled(database, "bob", "j0")
    bobs = await completions.list_completions(database, "bob", None, {}, Cursor())
    assert bobs.rows == []


async def test_a_chain_of_responses_is_whole_or_not_there(database: Database) -> None:
    await responses.add_response(database, _response("r0"))
    await responses.add_response(database, _response("r1", "r0"))
    chain = await responses.chain_of(database, "alice", "r1")
    assert chain is not None
    assert [row.id for row in chain] == ["r0", "r1"]
    assert await responses.chain_of(database, "bob", "r1") is None
    await responses.delete_response(database, "alice", "r0")
    assert await responses.chain_of(database, "alice", "r1") is None


async def test_a_jobs_events_are_read_from_any_of_them_on(database: Database) -> None:
    await jobs.add_job(database, "j0", "alice", "chat")
    assert not await jobs.add_events(database, "j0", 0, ["a", "b"], jobs.RUNNING)
    assert await jobs.want_cancelled(database, "alice", "j0")
    assert await jobs.add_events(database, "j0", 2, ["c"], jobs.DONE)
    found = await jobs.read_events(database, "alice", "j0", 1)
    assert found is not None
    assert (found[0].status, found[1]) == (jobs.DONE, ["b", "c"])
    await jobs.delete_job(database, "alice", "j0")
    assert await jobs.read_events(database, "alice", "j0", 0) is None
    assert not await jobs.add_events(database, "j0", 3, ["d"], jobs.DONE)


async def test_a_job_whose_server_died_is_failed(database: Database) -> None:
    await jobs.add_job(database, "j0", "alice", "chat")
    assert await jobs.fail_dead_jobs(database) == []
    async with database.writing() as session:
        await session.execute(text("UPDATE jobs SET touched_at = 0"))
    assert await jobs.fail_dead_jobs(database) == [("alice", "j0")]
    await jobs.sweep_jobs(database, now() + 1)
    assert await jobs.find_job(database, "alice", "j0") is None


def test_the_store_imports_without_torch() -> None:
    modules = "database, keys, models, files, completions, responses, jobs"
    program = f"import sys; from fledge.store import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


async def _upload(
    database: Database, blobs: Blobs, content: bytes, name: str, expires_at: int | None = None
) -> files.FileRow:
    with blobs.writer() as writer:
        writer.write(content)
        return await files.add_file(database, writer, files.NewFile("alice", name, "batch", expires_at))


def _completion(name: str, labels: dict[str, str] | None = None) -> CompletionRow:
    return CompletionRow(
        id=name, created_at=now(), owner="alice", model="m", labels=labels, messages=[], body={"id": name}
    )


def _response(name: str, previous: str | None = None) -> ResponseRow:
    about = {"owner": "alice", "status": "completed", "is_background": False, "inputs": [], "body": {}}
    return ResponseRow(id=name, created_at=now(), previous_id=previous, **about)


def test_ids_cannot_be_guessed() -> None:
    assert len({new_id("x") for _ in range(100)}) == 100


async def test_writers_of_one_process_take_turns_in_the_order_they_came(tmp_path: Path) -> None:
    """Under SQLite's own lock the last to come may be the first to get it, and one may wait for ever."""
    database = Database(sqlite_url(tmp_path / "turns.db"))
    await database.open()
    order: list[int] = []

    async def write(number: int) -> None:
        async with database.writing():
            order.append(number)
            await asyncio.sleep(0.001)

    try:
        await asyncio.gather(*(write(number) for number in range(60)))
    finally:
        await database.close()
    assert order == list(range(60))
