"""Fine-tuning jobs, permissions, conversations and batches in the store, on SQLite and on PostgreSQL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from fledge.errors import UserError
from fledge.store import conversations, models, permissions, tuning
from fledge.store.blobs import Blobs
from fledge.store.database import Database
from fledge.store.files import NewFile, file_row, find_file
from fledge.store.pages import Cursor, UnknownCursor, now
from fledge.store.tables import ConversationRow, ModelRow, TuningCheckpointRow, TuningJobRow

pytestmark = pytest.mark.anyio


def job(name: str = "ftjob-1", status: str = "queued") -> TuningJobRow:
    about: dict[str, Any] = {"owner": "alice", "model": "m", "training_file": "f", "seed": 1, "result_files": []}
    return TuningJobRow(id=name, created_at=now(), status=status, method={"type": "supervised"}, **about)


async def status_of(database: Database, name: str = "ftjob-1") -> str:
    row = await tuning.find_tuning_job(database, "alice", name)
    assert row is not None
    return row.status


async def test_a_job_is_leased_once_and_again_when_its_worker_died(database: Database) -> None:
    await tuning.add_tuning_job(database, job())
    assert await tuning.has_work(database)
    first = await tuning.lease_job(database, "w1")
    assert first is not None
    assert await tuning.lease_job(database, "w2") is None
    assert not await tuning.has_work(database)
    assert await tuning.renew_lease(database, first.id, "w1") == (True, None)
    async with database.writing() as session:
        await session.execute(text("UPDATE tuning_jobs SET leased_until = 0"))
    second = await tuning.lease_job(database, "w2")
    assert second is not None
    assert await tuning.renew_lease(database, first.id, "w1") == (False, None)
    assert not await tuning.change_job(database, first.id, "w1", status="failed")
    await tuning.release_jobs(database, "w2")
    assert await status_of(database) == "queued"


async def test_files_are_checked_once_and_failures_are_told(database: Database) -> None:
    await tuning.add_tuning_job(database, job("a", "validating_files"))
    await tuning.add_tuning_job(database, job("b", "validating_files"))
    assert [row.id for row in await tuning.unchecked_jobs(database)] == ["a", "b"]
    assert await tuning.settle_check(database, "a", None)
    assert not await tuning.settle_check(database, "a", {"code": "late"})
    assert await tuning.settle_check(database, "b", {"code": "bad", "message": "m", "param": None})
    assert [await status_of(database, name) for name in "ab"] == ["queued", "failed"]


async def test_what_the_owner_wants_reaches_the_worker(database: Database) -> None:
    await tuning.add_tuning_job(database, job())
    await tuning.lease_job(database, "w")
    asked = await tuning.ask_of_job(database, "alice", "ftjob-1", when=("running",), wanted="pause")
    assert asked is not None
    assert await tuning.look_at_job(database, "ftjob-1", "w") == (True, "pause")
    assert await tuning.ask_of_job(database, "bob", "ftjob-1", when=("running",), wanted="cancel") is None
    assert await tuning.ask_of_job(database, "alice", "ftjob-1", when=("queued",), status="cancelled") is None


async def test_a_step_that_is_told_twice_stands_once(database: Database) -> None:
    await tuning.add_tuning_job(database, job())
    for _ in range(2):
        await tuning.add_tuning_event(database, "ftjob-1", "Step 1", data={"step": 1}, event_id="ftevent-1")
    await tuning.add_tuning_event(database, "nobody", "lost")
    page = await tuning.list_tuning_events(database, "ftjob-1", Cursor())
    assert [(row.id, row.type) for row in page.rows] == [("ftevent-1", "metrics")]
    for _ in range(2):
        row = TuningCheckpointRow(id=f"c{_}", created_at=1, job_id="ftjob-1", model="ft:x", step_number=1, metrics={})
        model = ModelRow(id="ft:x", created_at=1, owner="alice", owned_by="alice", path="p")
        assert await tuning.add_tuning_checkpoint(database, row, model) is (_ == 0)


async def test_a_finished_job_brings_its_model_and_its_file_at_once(database: Database, tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    await tuning.add_tuning_job(database, job())
    await tuning.lease_job(database, "w")

    def rows() -> list[Any]:
        with blobs.writer() as writer:
            writer.write(b"step\n1\n")
            file = file_row(writer, NewFile("alice", "m.csv", "fine-tune-results"))
        return [file, ModelRow(id="ft:y", created_at=1, owner="alice", owned_by="alice", path="p")]

    assert not await tuning.finish_job(database, "ftjob-1", "another", rows)
    assert await tuning.finish_job(database, "ftjob-1", "w", rows, fine_tuned_model="ft:y")
    assert not await tuning.finish_job(database, "ftjob-1", "w", rows)
    done = await tuning.find_tuning_job(database, "alice", "ftjob-1")
    assert done is not None
    assert (done.status, done.fine_tuned_model, done.worker) == ("succeeded", "ft:y", None)
    assert await find_file(database, "alice", done.result_files[0]) is not None
    assert await models.find_model(database, "alice", "ft:y") is not None


async def test_a_permission_lets_another_owner_use_a_model_until_it_is_revoked(database: Database) -> None:
    await models.register_model(database, "ft:z", owner="alice", path="p")
    assert await models.find_model(database, "bob", "ft:z") is None
    granted = await permissions.grant(database, "alice", "ft:z", ["bob", "carol", "bob"])
    assert [row.project_id for row in granted] == ["bob", "carol"]
    assert [row.id for row in await permissions.grant(database, "alice", "ft:z", ["bob"])] == [granted[0].id]
    assert await models.find_model(database, "bob", "ft:z") is not None
    assert await models.find_own_model(database, "bob", "ft:z") is None
    assert not await models.delete_model(database, "bob", "ft:z")
    page = await permissions.list_permissions(database, "alice", "ft:z", "carol", Cursor())
    assert [row.project_id for row in page.rows] == ["carol"]
    assert not await permissions.revoke(database, "bob", "ft:z", granted[0].id)
    assert await permissions.revoke(database, "alice", "ft:z", granted[0].id)
    assert not await permissions.revoke(database, "alice", "ft:z", granted[0].id)
    assert await models.find_model(database, "bob", "ft:z") is None
    assert await models.delete_model(database, "alice", "ft:z")
    assert (await permissions.list_permissions(database, "alice", "ft:z", None, Cursor())).rows == []


async def test_conversations_keep_their_items_apart_and_in_order(database: Database) -> None:
    for name, owner in (("conv_a", "alice"), ("conv_b", "bob")):
        row = ConversationRow(id=name, created_at=now(), owner=owner, labels=None)
        await conversations.add_conversation(database, row, [{"id": "m1", "of": owner}])
    await conversations.add_items(database, "conv_a", [{"id": "m2"}, {"id": "m1", "of": "nobody"}, {"id": "m3"}])
    assert [item["id"] for item in await conversations.all_items(database, "conv_a")] == ["m1", "m2", "m3"]
    assert await conversations.find_item(database, "conv_a", "m1") == {"id": "m1", "of": "alice"}
    page = await conversations.list_items(database, "conv_a", Cursor(1, "desc", after="m3"))
    assert ([row.body["id"] for row in page.rows], page.has_more) == (["m2"], True)
    with pytest.raises(UnknownCursor, match="'m9'"):
        await conversations.list_items(database, "conv_a", Cursor(after="m9"))
    assert await conversations.find_conversation(database, "bob", "conv_a") is None
    assert not await conversations.delete_conversation(database, "bob", "conv_a")
    assert await conversations.delete_item(database, "conv_a", "m1")
    assert not await conversations.delete_item(database, "conv_a", "m1")
    assert await conversations.find_item(database, "conv_b", "m1") is not None
    assert await conversations.delete_conversation(database, "alice", "conv_a")
    assert await conversations.all_items(database, "conv_a") == []
    await conversations.add_items(database, "conv_a", [{"id": "late"}])


async def test_a_conversation_has_its_bound(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "MAX_ITEMS", 2)
    await conversations.add_conversation(
        database, ConversationRow(id="conv_a", created_at=1, owner="alice", labels=None), []
    )
    await conversations.add_items(database, "conv_a", [{"id": "1"}, {"id": "2"}])
    with pytest.raises(UserError, match="more than 2"):
        await conversations.add_items(database, "conv_a", [{"id": "3"}])
