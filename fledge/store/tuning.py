"""Fine-tuning jobs with their events and checkpoints, as the API and the worker see them. Layer 2, no torch.

A worker takes a job by a lease that it renews; when it dies, the lease runs out and another takes the job over where
its last checkpoint stands. What the owner asks meanwhile stands in `wanted`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from sqlalchemy import and_, or_, select, true, update

from fledge.store.database import Database
from fledge.store.owned import find_row, is_own
from fledge.store.pages import Cursor, Page, labelled, new_id, now, read_page
from fledge.store.tables import Base, FileRow, ModelRow, TuningCheckpointRow, TuningEventRow, TuningJobRow

WAITING = ("validating_files", "queued", "paused")
ENDED = ("succeeded", "failed", "cancelled")
LEASE_SECONDS = 60
WORK_SECONDS = 10  # so often a worker renews what it has


async def add_tuning_job(database: Database, row: TuningJobRow) -> None:
    async with database.writing() as session:
        session.add(row)


async def find_tuning_job(database: Database, owner: str, job_id: str) -> TuningJobRow | None:
    return await find_row(database, TuningJobRow, owner, job_id)


async def list_tuning_jobs(
    database: Database, owner: str, labels: dict[str, str], cursor: Cursor
) -> Page[TuningJobRow]:
    filters = labelled(TuningJobRow.labels, labels)
    async with database.reading() as session:
        return await read_page(session, TuningJobRow, TuningJobRow.owner == owner, cursor, filters)


async def ask_of_job(
    database: Database,
    owner: str,
    job_id: str,
    *,
    when: tuple[str, ...],
    status: str | None = None,
    wanted: Literal["cancel", "pause"] | None = None,
) -> TuningJobRow | None:
    """Set the status at once, or what the worker is to do, if the job's status is one of `when`; else None. A job
    whose end has been asked for can be asked nothing else."""
    changes: dict[str, Any] = {"wanted": wanted}
    if status is not None:
        changes |= {"status": status, "finished_at": now() if status in ENDED else None}
    is_end = wanted == "cancel" or status == "cancelled"
    is_free = true() if is_end else or_(TuningJobRow.wanted.is_(None), TuningJobRow.wanted != "cancel")
    changed = (
        update(TuningJobRow)
        .where(is_own(TuningJobRow, owner, job_id), TuningJobRow.status.in_(when), is_free)
        .values(**changes)
        .returning(TuningJobRow)
    )
    async with database.writing() as session:
        return await session.scalar(changed)


async def list_tuning_events(database: Database, job_id: str, cursor: Cursor) -> Page[TuningEventRow]:
    """Of a job whose owner has been checked."""
    async with database.reading() as session:
        return await read_page(session, TuningEventRow, TuningEventRow.job_id == job_id, cursor)


async def list_tuning_checkpoints(database: Database, job_id: str, cursor: Cursor) -> Page[TuningCheckpointRow]:
    """Of a job whose owner has been checked."""
    async with database.reading() as session:
        return await read_page(session, TuningCheckpointRow, TuningCheckpointRow.job_id == job_id, cursor)


# The worker's side.


async def lease_job(database: Database, worker: str) -> TuningJobRow | None:
    """Take the oldest job that waits, or whose worker has died; None if there is none. It is looked for without any
    lock first."""
    is_waiting = TuningJobRow.status == "queued"
    is_abandoned = and_(TuningJobRow.status == "running", TuningJobRow.leased_until < now())
    oldest = select(TuningJobRow).where(or_(is_waiting, is_abandoned)).order_by(TuningJobRow.seq).limit(1)
    async with database.reading() as session:
        if (await session.scalar(oldest)) is None:
            return None
    async with database.writing() as session:
        row = await session.scalar(oldest.with_for_update(skip_locked=True))
        if row is not None:
            row.status, row.worker, row.leased_until = "running", worker, now() + LEASE_SECONDS
        return row


async def has_work(database: Database) -> bool:
    """Whether there is anything for a worker to do."""
    is_waiting = TuningJobRow.status.in_(("validating_files", "queued"))
    is_abandoned = and_(TuningJobRow.status == "running", TuningJobRow.leased_until < now())
    async with database.reading() as session:
        return (
            await session.scalar(select(TuningJobRow.seq).where(or_(is_waiting, is_abandoned)).limit(1))
        ) is not None


async def unchecked_jobs(database: Database) -> list[TuningJobRow]:
    """Jobs whose files nobody has looked into yet, oldest first."""
    waiting = select(TuningJobRow).where(TuningJobRow.status == "validating_files").order_by(TuningJobRow.seq)
    async with database.reading() as session:
        return list((await session.scalars(waiting)).all())


async def settle_check(database: Database, job_id: str, error: dict[str, Any] | None) -> bool:
    """A job's files have been looked into: it waits for a worker, or has failed; false if that is settled already."""
    changes: dict[str, Any] = {"status": "queued"}
    if error is not None:
        changes = {"status": "failed", "error": error, "finished_at": now()}
    settled = (
        update(TuningJobRow)
        .where(TuningJobRow.id == job_id, TuningJobRow.status == "validating_files")
        .values(**changes)
        .returning(TuningJobRow.id)
    )
    async with database.writing() as session:
        return (await session.scalar(settled)) is not None


async def release_jobs(database: Database, worker: str) -> None:
    """What a worker that has ended left running waits for the next."""
    left = (
        update(TuningJobRow)
        .where(TuningJobRow.worker == worker, TuningJobRow.status == "running")
        .values(status="queued", worker=None, leased_until=None)
    )
    async with database.writing() as session:
        await session.execute(left)


async def renew_lease(database: Database, job_id: str, worker: str) -> tuple[bool, str | None]:
    """Whether the job is still this worker's, and what its owner wants of it."""
    renewed = (
        update(TuningJobRow)
        .where(TuningJobRow.id == job_id, TuningJobRow.worker == worker, TuningJobRow.status == "running")
        .values(leased_until=now() + LEASE_SECONDS)
        .returning(TuningJobRow.id, TuningJobRow.wanted)
    )
    async with database.writing() as session:
        found = (await session.execute(renewed)).first()
    return (False, None) if found is None else (True, found[1])


async def look_at_job(database: Database, job_id: str, worker: str) -> tuple[bool, str | None]:
    """The same, without renewing anything."""
    asked = select(TuningJobRow.wanted).where(
        TuningJobRow.id == job_id, TuningJobRow.worker == worker, TuningJobRow.status == "running"
    )
    async with database.reading() as session:
        found = (await session.execute(asked)).first()
    return (False, None) if found is None else (True, found[0])


async def change_job(database: Database, job_id: str, worker: str, /, **changes: Any) -> bool:
    """Set columns of a job that is this worker's; false if it no longer is."""
    changed = (
        update(TuningJobRow)
        .where(TuningJobRow.id == job_id, TuningJobRow.worker == worker)
        .values(**changes)
        .returning(TuningJobRow.id)
    )
    async with database.writing() as session:
        return (await session.scalar(changed)) is not None


async def add_tuning_event(
    database: Database,
    job_id: str,
    message: str,
    *,
    level: Literal["info", "warn", "error"] = "info",
    data: dict[str, Any] | None = None,
    event_id: str | None = None,
) -> None:
    """`data`: the metrics of a step. With an `event_id` that is there already nothing is added: a run that was resumed
    tells some steps again. Nothing either for a job that is gone."""
    kind = "message" if data is None else "metrics"
    row = TuningEventRow(id=event_id or new_id("ftevent-"), created_at=now(), job_id=job_id, level=level, type=kind)
    row.message, row.data = message, data or {}
    async with database.writing() as session:
        is_known = event_id is not None and await session.scalar(
            select(TuningEventRow.seq).where(TuningEventRow.id == event_id)
        )
        if not is_known and await session.scalar(select(TuningJobRow.seq).where(TuningJobRow.id == job_id)):
            session.add(row)


async def finish_job(
    database: Database, job_id: str, worker: str, rows: Callable[[], Sequence[Base]], **changes: Any
) -> bool:
    """A job has succeeded: its results (files among them become its `result_files`) and its new columns together;
    false if it is no longer this worker's.

    `rows` is called within the writing block, so that it may keep contents of files (files.py).
    """
    done = (
        update(TuningJobRow)
        .where(TuningJobRow.id == job_id, TuningJobRow.worker == worker, TuningJobRow.status == "running")
        .values(status="succeeded", finished_at=now(), wanted=None, worker=None, leased_until=None, **changes)
        .returning(TuningJobRow.id)
    )
    async with database.writing() as session:
        if (await session.scalar(done)) is None:
            return False
        made = rows()
        session.add_all(made)
        files = [row.id for row in made if isinstance(row, FileRow)]
        await session.execute(update(TuningJobRow).where(TuningJobRow.id == job_id).values(result_files=files))
    return True


async def add_tuning_checkpoint(database: Database, row: TuningCheckpointRow, model: ModelRow) -> bool:
    """Show a checkpoint and serve it under its name; false if that has been done before, by a run that was resumed."""
    async with database.writing() as session:
        known = select(TuningCheckpointRow.seq).where(
            TuningCheckpointRow.job_id == row.job_id, TuningCheckpointRow.model == row.model
        )
        if (await session.scalar(known)) is not None:
            return False
        session.add_all([row, model])
    return True
