"""Pages of a list: newest or oldest first, from after a row that is named. Layer 2, no torch.

The published lists take `limit`, `order` and `after`, and say `has_more`. Rows come in the order in which they were
made; a row that is added while somebody reads on is found at the end where it belongs, never twice.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncSession

from fledge.errors import UserError
from fledge.store.tables import Listed

RowT = TypeVar("RowT", bound=Listed)
Order = Literal["asc", "desc"]


class UnknownCursor(UserError):
    """`after` names no row of this list."""


@dataclass(frozen=True)
class Page(Generic[RowT]):
    rows: Sequence[RowT]
    has_more: bool


@dataclass(frozen=True)
class Cursor:
    """Which stretch of a list: at most `limit` rows from behind the row `after`."""

    limit: int = 20
    order: Order = "asc"
    after: str | None = None


async def read_page(
    session: AsyncSession,
    table: type[RowT],
    own: ColumnElement[bool],
    cursor: Cursor,
    filters: Sequence[ColumnElement[bool]] = (),
) -> Page[RowT]:
    """The owner's rows of `table` that pass the filters. `UnknownCursor` if the row `after` is none of the owner's;
    it need not pass the filters itself, which what it says may have ceased to do."""
    is_falling = cursor.order == "desc"
    query = select(table).where(own, *filters)
    if cursor.after is not None:
        place = await session.scalar(select(table.seq).where(own, table.id == cursor.after))
        if place is None:
            raise UnknownCursor(f"no entry '{cursor.after[:100]}' in this list to go on from")
        query = query.where(table.seq < place if is_falling else table.seq > place)
    query = query.order_by(table.seq.desc() if is_falling else table.seq.asc()).limit(cursor.limit + 1)
    rows = (await session.scalars(query)).all()
    return Page(rows[: cursor.limit], len(rows) > cursor.limit)


def labelled(column: Any, labels: dict[str, str]) -> list[ColumnElement[bool]]:
    """Conditions: the metadata in `column` hold all of these pairs. `UserError` for a key that cannot be asked for."""
    for key in labels:
        if '"' in key or "\\" in key or "\0" in key:
            raise UserError("a metadata key to search for must not hold quotation marks, backslashes or NUL")
    return [column[key].as_string() == value for key, value in labels.items()]


def new_id(prefix: str) -> str:
    """A name that nobody can guess: 24 hexadecimal digits behind the prefix."""
    return prefix + secrets.token_hex(12)


def now() -> int:
    return int(time.time())
