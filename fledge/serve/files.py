"""/v1/files: uploads for fine-tuning and batches, and what these leave behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, File, Form, Query, Request, UploadFile
from starlette.responses import Response, StreamingResponse

from fledge.serve.auth import Principal, needs
from fledge.serve.errors import not_found, refused
from fledge.serve.sse import json_response
from fledge.serve.state import State, state_of
from fledge.serve.wire import After, Answer, Deleted, list_answer
from fledge.store import files as stored
from fledge.store.pages import Cursor, Order, now
from fledge.store.tables import FileRow

router = APIRouter(prefix="/v1/files", tags=["files"])

Owner = Annotated[Principal, Depends(needs("files"))]
MIN_SECONDS, MAX_SECONDS = 3600, 2_592_000  # that a file may be kept; published bounds
MAX_NAME = 512
_CHUNK = 1 << 20


class FileObject(Answer):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: str


class FileList(Answer):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def show(row: FileRow) -> dict[str, Any]:
    shown = {"id": row.id, "object": "file", "bytes": row.bytes, "created_at": row.created_at}
    shown |= {"filename": row.filename, "purpose": row.purpose, "status": row.status}
    return shown if row.expires_at is None else {**shown, "expires_at": row.expires_at}


@router.post("", responses={200: {"model": FileObject}})
async def upload(
    request: Request,
    principal: Owner,
    file: Annotated[UploadFile, File(description="the content")],
    purpose: Annotated[str, Form(description=", ".join(stored.PURPOSES))],
    anchor: Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")] = None,
    seconds: Annotated[int | None, Form(alias="expires_after[seconds]", ge=MIN_SECONDS, le=MAX_SECONDS)] = None,
) -> Response:
    if purpose not in stored.PURPOSES:
        raise refused(f"a purpose is one of {', '.join(stored.PURPOSES)}", "purpose", "invalid_value")
    if (anchor is None) != (seconds is None):
        raise refused("'expires_after' needs both 'anchor' and 'seconds'", "expires_after", "invalid_value")
    expires_at = None if seconds is None else now() + seconds
    new = stored.NewFile(principal.owner, (file.filename or "upload")[:MAX_NAME], purpose, expires_at)
    state = state_of(request)
    with state.blobs.writer() as writer:
        await asyncio.to_thread(_copy, file.file, writer.write)
        row = await stored.add_file(state.database, writer, new)
    return json_response(show(row))


def _copy(source: BinaryIO, write: Any) -> None:
    while chunk := source.read(_CHUNK):
        write(chunk)


@router.get("", responses={200: {"model": FileList}})
async def list_files(
    request: Request,
    principal: Owner,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=0, le=10_000)] = 10_000,
    order: Order = "desc",
    after: After = None,
) -> Response:
    cursor = Cursor(limit, order, after)
    page = await stored.list_files(state_of(request).database, principal.owner, purpose, cursor)
    return json_response(list_answer([show(row) for row in page.rows], page.has_more))


@router.get("/{file_id}", responses={200: {"model": FileObject}})
async def retrieve(request: Request, file_id: str, principal: Owner) -> Response:
    return json_response(show(await _find(state_of(request), principal, file_id)))


@router.delete("/{file_id}", responses={200: {"model": Deleted}})
async def delete(request: Request, file_id: str, principal: Owner) -> Response:
    state = state_of(request)
    if not await stored.delete_file(state.database, state.blobs, principal.owner, file_id):
        raise not_found("file", file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


@router.get("/{file_id}/content", response_class=Response)
async def content(request: Request, file_id: str, principal: Owner) -> Response:
    """The bytes as they came. They are never shown by a browser: what is in them is the uploader's."""
    state = state_of(request)
    row = await _find(state, principal, file_id)
    name = quote(row.filename.encode(errors="replace"), safe="")
    headers = {
        "content-disposition": f"attachment; filename*=UTF-8''{name}",
        "content-length": str(row.bytes),
    }
    if not state.blobs.path(row.sha256).is_file():
        raise FileNotFoundError(f"the content {row.sha256} of file {row.id} is missing")
    chunks: Iterator[bytes] = state.blobs.chunks(row.sha256)
    return StreamingResponse(chunks, media_type="application/octet-stream", headers=headers)


async def require_file(state: State, principal: Principal, file_id: str, field: str, purpose: str) -> None:
    """A request names a file in `field`: 404 if there is none, 400 if it was uploaded for something else."""
    row = await stored.find_file(state.database, principal.owner, file_id)
    if row is None:
        raise not_found("file", file_id, field)
    if row.purpose != purpose:
        message = f"The file '{file_id}' was uploaded for '{row.purpose}'; upload it with purpose '{purpose}'"
        raise refused(message, field, "invalid_file_purpose")


async def _find(state: State, principal: Principal, file_id: str) -> FileRow:
    row = await stored.find_file(state.database, principal.owner, file_id)
    if row is None:
        raise not_found("file", file_id)
    return row
