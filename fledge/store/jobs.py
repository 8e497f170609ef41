"""Generations that go on without their client, with the events they have sent. Layer 2, no torch.

The server that runs a job writes its events in batches and renews `touched_at` with each; a job that nobody has touched
for `DEAD_SECONDS` was run by a server that died, and is failed by whoever finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select, update

from fledge.store.database import Database
from fledge.store.owned import delete_row, find_row, is_own
from fledge.store.pages import now
from fledge.store.tables import JobEventRow, JobRow

RUNNING, DONE, FAILED, CANCELLED = "running", "done", "failed", "cancelled"
DEAD_SECONDS = 60


async def add_job(database: Database, job_id: str, owner: str, kind: str) -> None:
    row = JobRow(id=job_id, created_at=now(), owner=owner, kind=kind, status=RUNNING, touched_at=now())
    row.is_cancel_wanted = False
    async with database.writing() as session:
        session.add(row)


async def find_job(database: Database, owner: str, job_id: str) -> JobRow | None:
    return await find_row(database, JobRow, owner, job_id)


async def add_events(
    database: Database,
    job_id: str,
    first: int,
    events: Sequence[str],
    status: str,
    error: dict[str, Any] | None = None,
) -> bool:
    """Write events `first`, `first` + 1, ... and the status; true if somebody wants the job cancelled."""
    touched = (
        update(JobRow)
        .where(JobRow.id == job_id)
        .values(status=status, touched_at=now(), finished_at=None if status == RUNNING else now(), error=error)
        .returning(JobRow.is_cancel_wanted)
    )
    async with database.writing() as session:
        wanted = await session.scalar(touched)
        if wanted is not None:  # else the job was deleted meanwhile
            session.add_all(JobEventRow(job_id=job_id, number=first + i, data=data) for i, data in enumerate(events))
    return bool(wanted)


async def read_events(
    database: Database, owner: str, job_id: str, first: int, limit: int = 1000
) -> tuple[JobRow, list[str]] | None:
    """The job and its events from number `first` on, at most `limit`; None if the owner has no such job."""
    async with database.reading() as session:
        row = await session.scalar(select(JobRow).where(is_own(JobRow, owner, job_id)))
        if row is None:
            return None
        events = (
            select(JobEventRow.data)
            .where(JobEventRow.job_id == job_id, JobEventRow.number >= first)
            .order_by(JobEventRow.number)
            .limit(limit)
        )
        return row, list((await session.scalars(events)).all())


async def want_cancelled(database: Database, owner: str, job_id: str) -> bool:
    """Ask whichever server runs the job to end it; false if it is not running."""
    asked = (
        update(JobRow)
        .where(is_own(JobRow, owner, job_id), JobRow.status == RUNNING)
        .values(is_cancel_wanted=True)
        .returning(JobRow.id)
    )
    async with database.writing() as session:
        return (await session.scalar(asked)) is not None


async def fail_dead_jobs(database: Database) -> list[tuple[str, str]]:
    """Fail the jobs whose server died; their owners and ids."""
    dead = (
        update(JobRow)
        .where(JobRow.status == RUNNING, JobRow.touched_at < now() - DEAD_SECONDS)
        .values(status=FAILED, finished_at=now())
        .returning(JobRow.owner, JobRow.id)
    )
    async with database.writing() as session:
        return [(owner, job_id) for owner, job_id in (await session.execute(dead)).all()]


async def sweep_jobs(database: Database, older_than: int) -> None:
    """Delete what ended before this time; its events go with it."""
    async with database.writing() as session:
        await session.execute(delete(JobRow).where(JobRow.finished_at < older_than))


async def delete_job(database: Database, owner: str, job_id: str) -> None:
    await delete_row(database, JobRow, owner, job_id)
