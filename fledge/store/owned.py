"""Rows that belong to somebody: found, labelled and deleted by owner and id at once. Layer 2, no torch.

So somebody else's row and one that does not exist are the same to whoever asks.
"""

from __future__ import annotations

from typing import Any, TypeVar

from sqlalchemy import ColumnElement, and_, delete, false, select, update

from fledge.store.database import Database
from fledge.store.tables import Labelled, Owned

OwnedT = TypeVar("OwnedT", bound=Owned)
LabelledT = TypeVar("LabelledT", bound=Labelled)


def is_own(table: type[OwnedT], owner: str, row_id: str) -> ColumnElement[bool]:
    """The condition that a query asks for. PostgreSQL holds no NUL in a text, so no row has such an id."""
    return false() if "\0" in row_id else and_(table.owner == owner, table.id == row_id)


async def find_row(database: Database, table: type[OwnedT], owner: str, row_id: str) -> OwnedT | None:
    async with database.reading() as session:
        return await session.scalar(select(table).where(is_own(table, owner, row_id)))


async def label_row(
    database: Database, table: type[LabelledT], owner: str, row_id: str, labels: dict[str, Any] | None
) -> LabelledT | None:
    """Replace its metadata; the row as it is then, None if there is none."""
    changed = update(table).where(is_own(table, owner, row_id)).values(labels=labels).returning(table)
    async with database.writing() as session:
        return await session.scalar(changed)


async def delete_row(database: Database, table: type[OwnedT], owner: str, row_id: str) -> bool:
    """False if there is none."""
    gone = delete(table).where(is_own(table, owner, row_id)).returning(table.id)
    async with database.writing() as session:
        return (await session.scalar(gone)) is not None
