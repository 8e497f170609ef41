"""Conversations that responses belong to, and what was said in them. Layer 2, no torch.

An item is known by its id within its conversation; the row's own id has the conversation's before it, for two users
may name their items alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select

from fledge.errors import UserError
from fledge.store.database import Database
from fledge.store.owned import delete_row, find_row, label_row
from fledge.store.pages import Cursor, Page, UnknownCursor, now, read_page
from fledge.store.tables import ConversationItemRow, ConversationRow

MAX_ITEMS = 10_000  # of one conversation
Item = dict[str, Any]


async def add_conversation(database: Database, row: ConversationRow, items: Sequence[Item]) -> None:
    async with database.writing() as session:
        session.add(row)
        await session.flush()
        session.add_all(_rows(row.id, items))


async def find_conversation(database: Database, owner: str, conversation_id: str) -> ConversationRow | None:
    return await find_row(database, ConversationRow, owner, conversation_id)


async def label_conversation(
    database: Database, owner: str, conversation_id: str, labels: dict[str, Any] | None
) -> ConversationRow | None:
    """Replace its metadata; the row as it is then, None if there is none."""
    return await label_row(database, ConversationRow, owner, conversation_id, labels)


async def delete_conversation(database: Database, owner: str, conversation_id: str) -> bool:
    return await delete_row(database, ConversationRow, owner, conversation_id)


async def add_items(database: Database, conversation_id: str, items: Sequence[Item]) -> None:
    """Add to a conversation whose owner has been checked; items that are there already stay as they are."""
    async with database.writing() as session:
        if await session.scalar(select(ConversationRow.seq).where(ConversationRow.id == conversation_id)) is None:
            return  # deleted meanwhile
        known = set((await session.scalars(_ids(conversation_id))).all())
        new = [row for row in _rows(conversation_id, items) if row.id not in known]
        if len(known) + len(new) > MAX_ITEMS:
            raise UserError(f"a conversation of more than {MAX_ITEMS} items; begin a new one")
        session.add_all(new)


async def list_items(database: Database, conversation_id: str, cursor: Cursor) -> Page[ConversationItemRow]:
    """Of a conversation whose owner has been checked."""
    after = None if cursor.after is None else _row_id(conversation_id, cursor.after)
    own = ConversationItemRow.conversation_id == conversation_id
    async with database.reading() as session:
        try:
            return await read_page(session, ConversationItemRow, own, Cursor(cursor.limit, cursor.order, after))
        except UnknownCursor:
            raise UnknownCursor(f"no entry '{(cursor.after or '')[:100]}' in this list to go on from") from None


async def all_items(database: Database, conversation_id: str) -> list[Item]:
    """Of a conversation whose owner has been checked, in order."""
    rows = select(ConversationItemRow).where(ConversationItemRow.conversation_id == conversation_id)
    async with database.reading() as session:
        return [row.body for row in (await session.scalars(rows.order_by(ConversationItemRow.seq))).all()]


async def find_item(database: Database, conversation_id: str, item_id: str) -> Item | None:
    """Of a conversation whose owner has been checked."""
    async with database.reading() as session:
        row = await session.scalar(
            select(ConversationItemRow).where(ConversationItemRow.id == _row_id(conversation_id, item_id))
        )
        return None if row is None else row.body


async def delete_item(database: Database, conversation_id: str, item_id: str) -> bool:
    """Of a conversation whose owner has been checked."""
    gone = delete(ConversationItemRow).where(ConversationItemRow.id == _row_id(conversation_id, item_id))
    async with database.writing() as session:
        return (await session.scalar(gone.returning(ConversationItemRow.id))) is not None


def _ids(conversation_id: str) -> Any:
    return select(ConversationItemRow.id).where(ConversationItemRow.conversation_id == conversation_id)


def _rows(conversation_id: str, items: Sequence[Item]) -> list[ConversationItemRow]:
    unique = {_row_id(conversation_id, str(item["id"])): item for item in items}
    return [
        ConversationItemRow(id=name, created_at=now(), conversation_id=conversation_id, body=item)
        for name, item in unique.items()
    ]


def _row_id(conversation_id: str, item_id: str) -> str:
    return f"{conversation_id}/{item_id}"
