"""Batches of requests. Layer 2, no torch."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, update

from fledge.store.database import Database
from fledge.store.pages import Cursor, Page, read_page
from fledge.store.tables import BatchRow

OPEN = ("validating", "in_progress", "finalizing", "cancelling")


async def add_batch(database: Database, row: BatchRow) -> None:
    async with database.writing() as session:
        session.add(row)


async def find_batch(database: Database, owner: str, batch_id: str) -> BatchRow | None:
    async with database.reading() as session:
        return await session.scalar(select(BatchRow).where(BatchRow.owner == owner, BatchRow.id == batch_id))


async def list_batches(database: Database, owner: str, cursor: Cursor) -> Page[BatchRow]:
    async with database.reading() as session:
        return await read_page(session, BatchRow, BatchRow.owner == owner, cursor)


async def open_batches(database: Database) -> list[BatchRow]:
    """Those that have not ended, of all owners, oldest first: what a server that starts goes on with."""
    async with database.reading() as session:
        found = await session.scalars(select(BatchRow).where(BatchRow.status.in_(OPEN)).order_by(BatchRow.seq))
        return list(found.all())


async def change_batch(
    database: Database, owner: str, batch_id: str, when: tuple[str, ...], **changes: Any
) -> BatchRow | None:
    """Set columns if the status is one of `when`; the row as it is then, else None."""
    changed = (
        update(BatchRow)
        .where(BatchRow.owner == owner, BatchRow.id == batch_id, BatchRow.status.in_(when))
        .values(**changes)
        .returning(BatchRow)
    )
    async with database.writing() as session:
        return await session.scalar(changed)
