"""Files: rows over the blobs. Layer 2, no torch.

A blob is deleted with the last row that names it. Both happen inside one writing block, and a new row is added
before its blob could be found unused, so no row ever names a blob that is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, delete, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from fledge.store.blobs import Blobs, BlobWriter
from fledge.store.database import Database
from fledge.store.owned import is_own
from fledge.store.pages import Cursor, Page, new_id, now, read_page
from fledge.store.tables import FileRow

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
MADE_PURPOSES = ("batch_output", "fine-tune-results", "assistants_output")  # what only the server makes


@dataclass(frozen=True)
class NewFile:
    """What is known of a file beside its content."""

    owner: str
    filename: str
    purpose: str
    expires_at: int | None = None


def _in_force() -> ColumnElement[bool]:
    return or_(FileRow.expires_at.is_(None), FileRow.expires_at > now())


async def add_file(database: Database, writer: BlobWriter, new: NewFile) -> FileRow:
    """Keep what the writer holds as a file."""
    async with database.writing() as session:
        row = file_row(writer, new)
        session.add(row)
    return row


def file_row(writer: BlobWriter, new: NewFile) -> FileRow:
    """The row of what the writer holds, whose content is kept; to be added in the writing block this is called in."""
    return FileRow(
        id=new_id("file-"),
        created_at=now(),
        owner=new.owner,
        filename=new.filename.replace("\0", ""),
        purpose=new.purpose,
        bytes=writer.num_bytes,
        sha256=writer.keep(),
        expires_at=new.expires_at,
    )


async def find_file(database: Database, owner: str, file_id: str) -> FileRow | None:
    async with database.reading() as session:
        return await session.scalar(select(FileRow).where(is_own(FileRow, owner, file_id), _in_force()))


async def list_files(database: Database, owner: str, purpose: str | None, cursor: Cursor) -> Page[FileRow]:
    filters = [_in_force()] if purpose is None else [_in_force(), FileRow.purpose == purpose]
    async with database.reading() as session:
        return await read_page(session, FileRow, FileRow.owner == owner, cursor, filters)


async def delete_file(database: Database, blobs: Blobs, owner: str, file_id: str) -> bool:
    """Delete a file and, if no other has it, its content; false if there is none."""
    return bool(await _delete(database, blobs, (is_own(FileRow, owner, file_id), _in_force())))


async def sweep_expired(database: Database, blobs: Blobs) -> int:
    """Delete the files whose time is over; how many."""
    return await _delete(database, blobs, (FileRow.expires_at <= now(),))


async def _delete(database: Database, blobs: Blobs, where: Sequence[ColumnElement[bool]]) -> int:
    async with database.writing() as session:
        gone = (await session.scalars(delete(FileRow).where(*where).returning(FileRow.sha256))).all()
        unused = [digest for digest in set(gone) if not await _is_used(session, digest)]
        for digest in unused:
            blobs.remove(digest)
    return len(gone)


async def _is_used(session: AsyncSession, digest: str) -> bool:
    return (await session.scalar(select(FileRow.seq).where(FileRow.sha256 == digest).limit(1))) is not None
