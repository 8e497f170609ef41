"""Responses of `/v1/responses`, and the chains that they form. Layer 2, no torch."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, update

from fledge.errors import UserError
from fledge.store.database import Database
from fledge.store.owned import delete_row, find_row, is_own
from fledge.store.tables import ResponseRow

MAX_CHAIN = 1000  # responses that one may stand on
PREFIX = "resp_"  # of a response's name


async def add_response(database: Database, row: ResponseRow) -> None:
    async with database.writing() as session:
        session.add(row)


async def find_response(database: Database, owner: str, response_id: str) -> ResponseRow | None:
    return await find_row(database, ResponseRow, owner, response_id)


async def update_response(database: Database, owner: str, response_id: str, body: dict[str, Any]) -> ResponseRow | None:
    """Replace the body, and the status by the body's; None if the response has been deleted meanwhile."""
    changed = (
        update(ResponseRow)
        .where(is_own(ResponseRow, owner, response_id))
        .values(body=body, status=body["status"])
        .returning(ResponseRow)
    )
    async with database.writing() as session:
        return await session.scalar(changed)


async def delete_response(database: Database, owner: str, response_id: str) -> bool:
    return await delete_row(database, ResponseRow, owner, response_id)


def name_item(response_id: str, prefix: str, place: int) -> str:
    """What an item of a response's output is called: like its response, so that `find_said` finds it again."""
    return f"{prefix}{response_id.removeprefix(PREFIX)}_{place}"


async def find_said(database: Database, owner: str, item_id: str) -> dict[str, Any] | None:
    """The item of this name in the output of a stored response; None if there is none."""
    of_response = item_id.partition("_")[2].rpartition("_")[0]
    row = await find_response(database, owner, PREFIX + of_response)
    said: list[dict[str, Any]] = [] if row is None else row.body.get("output", [])
    return next((item for item in said if item.get("id") == item_id), None)


async def chain_of(database: Database, owner: str, response_id: str) -> list[ResponseRow] | None:
    """The response and all that it stands on, oldest first; None if one of them is not there (any more)."""
    chain: list[ResponseRow] = []
    wanted: str | None = response_id
    async with database.reading() as session:
        while wanted is not None:
            if len(chain) == MAX_CHAIN:
                raise UserError(f"a conversation of more than {MAX_CHAIN} responses; begin a new one")
            row = await session.scalar(select(ResponseRow).where(is_own(ResponseRow, owner, wanted)))
            if row is None:
                return None
            chain.append(row)
            wanted = row.previous_id
    return chain[::-1]
