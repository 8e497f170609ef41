"""Batches of requests, and the lines of them that are answered. Layer 2, no torch.

A server runs a batch under a lease that it renews; when it dies, another takes the batch over behind the lines that
stand here. A line is answered once: what is here is final, and counts are changed in the same block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import and_, delete, or_, select, update

from fledge.store.database import Database
from fledge.store.owned import find_row, is_own
from fledge.store.pages import Cursor, Page, now, read_page
from fledge.store.tables import Base, BatchLineRow, BatchRow

OPEN = ("validating", "in_progress", "finalizing", "cancelling")
LEASE_SECONDS = 30


@dataclass(frozen=True)
class Line:
    """The answer to line `number`, from 0, as JSON."""

    number: int
    is_error: bool
    data: str


async def add_batch(database: Database, row: BatchRow) -> None:
    async with database.writing() as session:
        session.add(row)


async def find_batch(database: Database, owner: str, batch_id: str) -> BatchRow | None:
    return await find_row(database, BatchRow, owner, batch_id)


async def list_batches(database: Database, owner: str, cursor: Cursor) -> Page[BatchRow]:
    async with database.reading() as session:
        return await read_page(session, BatchRow, BatchRow.owner == owner, cursor)


async def cancel_batch(database: Database, owner: str, batch_id: str) -> BatchRow | None:
    """Ask whoever runs it to end it; None if it has ended, or is none of the owner's."""
    async with database.writing() as session:
        row = await session.scalar(
            select(BatchRow)
            .where(is_own(BatchRow, owner, batch_id), BatchRow.status.in_(("validating", "in_progress")))
            .with_for_update()
        )
        if row is not None:
            row.status, row.times = "cancelling", {**row.times, "cancelling_at": now()}
        return row


# The server's side.


async def lease_batch(database: Database, worker: str) -> BatchRow | None:
    """Take the oldest batch that has not ended and that nobody has. It is looked for without any lock first."""
    is_free = and_(BatchRow.status.in_(OPEN), or_(BatchRow.worker.is_(None), BatchRow.leased_until < now()))
    oldest = select(BatchRow).where(is_free).order_by(BatchRow.seq).limit(1)
    async with database.reading() as session:
        if (await session.scalar(oldest)) is None:
            return None
    async with database.writing() as session:
        row = await session.scalar(oldest.with_for_update(skip_locked=True))
        if row is not None:
            row.worker, row.leased_until = worker, now() + LEASE_SECONDS
        return row


async def renew_batch(database: Database, batch_id: str, worker: str) -> str | None:
    """The status of a batch that is still this server's; None if it no longer is."""
    renewed = (
        update(BatchRow)
        .where(BatchRow.id == batch_id, BatchRow.worker == worker)
        .values(leased_until=now() + LEASE_SECONDS)
        .returning(BatchRow.status)
    )
    async with database.writing() as session:
        return await session.scalar(renewed)


async def release_batches(database: Database, worker: str) -> None:
    """A server that ends leaves what it runs to the next."""
    left = update(BatchRow).where(BatchRow.worker == worker).values(worker=None, leased_until=None)
    async with database.writing() as session:
        await session.execute(left)


async def change_batch(
    database: Database,
    batch_id: str,
    worker: str,
    when: tuple[str, ...],
    change: Callable[[BatchRow], Sequence[Base]],
    *,
    is_last: bool = False,
) -> BatchRow | None:
    """Let `change` set columns and give further rows to add, all in one block, if the batch is this server's and its
    status is one of `when`; the row as it is then, else None. `is_last`: its answers, in files now, are dropped."""
    own = and_(BatchRow.id == batch_id, BatchRow.worker == worker, BatchRow.status.in_(when))
    async with database.writing() as session:
        row = await session.scalar(select(BatchRow).where(own).with_for_update())
        if row is not None:
            session.add_all(change(row))
        if row is not None and is_last:
            await session.execute(delete(BatchLineRow).where(BatchLineRow.batch_id == batch_id))
        return row


async def add_lines(database: Database, batch_id: str, worker: str, lines: Sequence[Line]) -> bool:
    """Write answers that are not there yet, and count them; false if the batch is no longer this server's."""
    async with database.writing() as session:
        own = select(BatchRow).where(BatchRow.id == batch_id, BatchRow.worker == worker)
        row = await session.scalar(own.with_for_update())
        if row is None:
            return False
        numbers = [line.number for line in lines]
        known = select(BatchLineRow.number).where(BatchLineRow.batch_id == batch_id, BatchLineRow.number.in_(numbers))
        there = set((await session.scalars(known)).all())
        new = [line for line in lines if line.number not in there]
        for line in new:
            session.add(BatchLineRow(batch_id=batch_id, number=line.number, is_error=line.is_error, data=line.data))
        num_failed = sum(line.is_error for line in new)
        counts = row.counts
        row.counts = {
            **counts,
            "completed": counts["completed"] + len(new) - num_failed,
            "failed": counts["failed"] + num_failed,
        }
    return True


async def answered(database: Database, batch_id: str) -> set[int]:
    """The numbers of the lines that have their answer."""
    async with database.reading() as session:
        return set((await session.scalars(select(BatchLineRow.number).where(BatchLineRow.batch_id == batch_id))).all())


async def read_lines(database: Database, batch_id: str, after: int, limit: int = 500) -> list[Line]:
    """Answers in order, from behind line `after` on."""
    asked = (
        select(BatchLineRow)
        .where(BatchLineRow.batch_id == batch_id, BatchLineRow.number > after)
        .order_by(BatchLineRow.number)
        .limit(limit)
    )
    async with database.reading() as session:
        return [Line(row.number, row.is_error, row.data) for row in (await session.scalars(asked)).all()]
