"""Stored chat completions. Layer 2, no torch."""

from __future__ import annotations

from typing import Any

from fledge.store.database import Database
from fledge.store.owned import delete_row, find_row, label_row
from fledge.store.pages import Cursor, Page, labelled, read_page
from fledge.store.tables import CompletionRow


async def add_completion(database: Database, row: CompletionRow) -> None:
    async with database.writing() as session:
        session.add(row)


async def find_completion(database: Database, owner: str, completion_id: str) -> CompletionRow | None:
    return await find_row(database, CompletionRow, owner, completion_id)


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
    return await label_row(database, CompletionRow, owner, completion_id, labels)


async def delete_completion(database: Database, owner: str, completion_id: str) -> bool:
    return await delete_row(database, CompletionRow, owner, completion_id)
