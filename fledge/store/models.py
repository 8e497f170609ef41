"""Models by name: aliases, and checkpoints that were registered, by fine-tuning above all. Layer 2, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, delete, exists, or_, select

from fledge.store.database import Database
from fledge.store.pages import now
from fledge.store.tables import ModelRow, PermissionRow


def _visible(owner: str) -> ColumnElement[bool]:
    """Models that are the owner's, everybody's, or shared with the owner (permissions.py)."""
    is_shared = exists().where(PermissionRow.model == ModelRow.id, PermissionRow.project_id == owner)
    return or_(ModelRow.owner == owner, ModelRow.owner.is_(None), is_shared)


async def find_model(database: Database, owner: str, name: str) -> ModelRow | None:
    """The model of this name if the owner may use it."""
    async with database.reading() as session:
        return await session.scalar(select(ModelRow).where(_visible(owner), ModelRow.id == name))


async def list_models(database: Database, owner: str) -> Sequence[ModelRow]:
    async with database.reading() as session:
        return (await session.scalars(select(ModelRow).where(_visible(owner)).order_by(ModelRow.seq))).all()


async def register_model(
    database: Database,
    name: str,
    *,
    owner: str | None,
    path: str | None = None,
    target: str | None = None,
    job_id: str | None = None,
) -> ModelRow:
    """Give a name to the checkpoint at `path`, or to the model `target`."""
    assert (path is None) != (target is None)
    row = ModelRow(id=name, created_at=now(), owner=owner, owned_by=owner or "fledge", path=path, target=target)
    row.job_id = job_id
    async with database.writing() as session:
        session.add(row)
    return row


async def find_own_model(database: Database, owner: str, name: str) -> ModelRow | None:
    """The same, if it is the owner's own."""
    async with database.reading() as session:
        return await session.scalar(select(ModelRow).where(ModelRow.owner == owner, ModelRow.id == name))


async def delete_model(database: Database, owner: str, name: str) -> bool:
    """Forget a model that is the owner's own; false if there is none. The checkpoint stays on the disk."""
    gone = delete(ModelRow).where(ModelRow.owner == owner, ModelRow.id == name).returning(ModelRow.id)
    async with database.writing() as session:
        return (await session.scalar(gone)) is not None
