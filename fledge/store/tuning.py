"""Fine-tuning jobs with their events and checkpoints, as the API and the worker see them. Layer 2, no torch.

A worker takes a job by a lease that it renews; when it dies, the lease runs out and another takes the job over where
its last checkpoint stands. What the owner asks meanwhile stands in `wanted`.
"""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import and_, delete, or_, select, update

from fledge.store.database import Database
from fledge.store.pages import Cursor, Page, labelled, new_id, now, read_page
from fledge.store.tables import TuningCheckpointRow, TuningEventRow, TuningJobRow

WAITING = ("validating_files", "queued")
ENDED = ("succeeded", "failed", "cancelled")
LEASE_SECONDS = 60


async def add_tuning_job(database: Database, row: TuningJobRow) -> None:
    async with database.writing() as session:
        session.add(row)


async def find_tuning_job(database: Database, owner: str, job_id: str) -> TuningJobRow | None:
    async with database.reading() as session:
        return await session.scalar(select(TuningJobRow).where(TuningJobRow.owner == owner, TuningJobRow.id == job_id))


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
    """Set the status at once, or what the worker is to do, if the job's status is one of `when`; else None."""
    changes: dict[str, Any] = {"wanted": wanted}
    if status is not None:
        changes |= {"status": status, "finished_at": now() if status in ENDED else None}
    changed = (
        update(TuningJobRow)
        .where(TuningJobRow.owner == owner, TuningJobRow.id == job_id, TuningJobRow.status.in_(when))
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
    """Take the oldest job that waits, or whose worker has died; None if there is none."""
    is_waiting = TuningJobRow.status == "queued"
    is_abandoned = and_(TuningJobRow.status == "running", TuningJobRow.leased_until < now())
    oldest = (
        select(TuningJobRow)
        .where(or_(is_waiting, is_abandoned))
        .order_by(TuningJobRow.seq)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    async with database.writing() as session:
        row = await session.scalar(oldest)
        if row is not None:
            row.status, row.worker, row.leased_until = "running", worker, now() + LEASE_SECONDS
        return row


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


async def change_job(database: Database, job_id: str, worker: str, **changes: Any) -> bool:
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
) -> None:
    """`data`: the metrics of a step."""
    kind = "message" if data is None else "metrics"
    row = TuningEventRow(id=new_id("ftevent-"), created_at=now(), job_id=job_id, level=level, type=kind)
    row.message, row.data = message, data or {}
    async with database.writing() as session:
        session.add(row)


async def add_tuning_checkpoint(database: Database, row: TuningCheckpointRow) -> None:
    async with database.writing() as session:
        session.add(row)


async def delete_tuning_job(database: Database, owner: str, job_id: str) -> bool:
    gone = delete(TuningJobRow).where(TuningJobRow.owner == owner, TuningJobRow.id == job_id)
    async with database.writing() as session:
        return (await session.scalar(gone.returning(TuningJobRow.id))) is not None
