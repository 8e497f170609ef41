"""Who else may use a fine-tuned model: grants of its owner to other owners. Layer 2, no torch.

The published API grants to projects; here an owner of keys is one.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select

from fledge.store.database import Database
from fledge.store.owned import is_own
from fledge.store.pages import Cursor, Page, new_id, now, read_page
from fledge.store.tables import PermissionRow


async def grant(database: Database, owner: str, model: str, project_ids: Sequence[str]) -> list[PermissionRow]:
    """A permission for each project, once; those that are there already stay as they are. `model` is the owner's."""
    wanted = list(dict.fromkeys(project_ids))
    async with database.writing() as session:
        held = select(PermissionRow).where(PermissionRow.model == model, PermissionRow.project_id.in_(wanted))
        found = {row.project_id: row for row in (await session.scalars(held)).all()}
        for project_id in wanted:
            if project_id not in found:
                row = PermissionRow(id=new_id("cp_"), created_at=now(), owner=owner, model=model, project_id=project_id)
                session.add(row)
                found[project_id] = row
    return [found[project_id] for project_id in wanted]


async def list_permissions(
    database: Database, owner: str, model: str, project_id: str | None, cursor: Cursor
) -> Page[PermissionRow]:
    own = (PermissionRow.owner == owner) & (PermissionRow.model == model)
    filters = [] if project_id is None else [PermissionRow.project_id == project_id]
    async with database.reading() as session:
        return await read_page(session, PermissionRow, own, cursor, filters)


async def revoke(database: Database, owner: str, model: str, permission_id: str) -> bool:
    gone = (
        delete(PermissionRow)
        .where(is_own(PermissionRow, owner, permission_id), PermissionRow.model == model)
        .returning(PermissionRow.id)
    )
    async with database.writing() as session:
        return (await session.scalar(gone)) is not None
