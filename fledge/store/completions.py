"""Stored chat completions. Layer 2, no torch."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, select, update

from fledge.store.database import Database
from fledge.store.pages import Cursor, Page, labelled, read_page
from fledge.store.tables import CompletionRow


async def add_completion(database: Database, row: CompletionRow) -> None:
    async with database.writing() as session:
        session.add(row)


async def find_completion(database: Database, owner: str, completion_id: str) -> CompletionRow | None:
    async with database.reading() as session:
        return await session.scalar(
            select(CompletionRow).where(CompletionRow.owner == owner, CompletionRow.id == completion_id)
        )


async def list_completions(
    database: Database, owner: str, model: str | None, labels: dict[str, str], cursor: Cursor
) -> Page[CompletionRow]:
    """Those of a model, or all, that carry these metadata. `UnknownCursor` as for `read_page`."""
    filters = labelled(CompletionRow.labels, labels)
    if model is not None:
        filters.append(CompletionRow.model == model)
    async with database.reading() as session:
        return await read_page(session, CompletionRow, CompletionRow.owner == owner, cursor, filters)


async def label_completion(
    database: Database, owner: str, completion_id: str, labels: dict[str, Any] | None
) -> CompletionRow | None:
    """Replace its metadata; the row as it is then, None if there is none."""
    changed = (
        update(CompletionRow)
        .where(CompletionRow.owner == owner, CompletionRow.id == completion_id)
        .values(labels=labels)
        .returning(CompletionRow)
    )
    async with database.writing() as session:
        return await session.scalar(changed)


async def delete_completion(database: Database, owner: str, completion_id: str) -> bool:
    gone = (
        delete(CompletionRow)
        .where(CompletionRow.owner == owner, CompletionRow.id == completion_id)
        .returning(CompletionRow.id)
    )
    async with database.writing() as session:
        return (await session.scalar(gone)) is not None
