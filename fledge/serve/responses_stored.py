"""Stored responses: retrieve, also as the stream they were, cancel, delete, and list what they were asked with."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from fledge.serve.auth import Principal, needs
from fledge.serve.errors import not_found, refused
from fledge.serve.jobs import Job
from fledge.serve.responses_events import repadded, told_again
from fledge.serve.responses_wire import ResponseObject
from fledge.serve.sse import EventStream, encode, json_response
from fledge.serve.state import State, state_of
from fledge.serve.wire import Deleted, Include, NewestFirst, list_answer, page_of
from fledge.store import jobs as stored_jobs
from fledge.store import responses as stored
from fledge.store.tables import ResponseRow

router = APIRouter(prefix="/v1/responses", tags=["responses"])

User = Annotated[Principal, Depends(needs("generate"))]
_OPEN = ("queued", "in_progress")


@router.get("/{response_id}", responses={200: {"model": ResponseObject}})
async def retrieve(
    request: Request,
    response_id: str,
    principal: User,
    include: Include,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=-1, lt=2**53)] = None,
    include_obfuscation: bool | None = None,
) -> Response:
    """`starting_after` is the `sequence_number` of the last event that the client has. Without `include_obfuscation`
    the events are as they were written."""
    state = state_of(request)
    row = await _settled(state, await _find(state, principal, response_id))
    if not stream:
        return json_response(row.body)
    start = 0 if starting_after is None else starting_after + 1
    job = await state.jobs.rejoin(principal.owner, response_id)
    if job is None:
        job = _retold(row)
    edit = None if include_obfuscation is None else partial(repadded, is_padded=include_obfuscation)
    return EventStream(job, start=start, is_named=True, edit=edit)


@router.post("/{response_id}/cancel", responses={200: {"model": ResponseObject}})
async def cancel(request: Request, response_id: str, principal: User) -> Response:
    """End a response in the background; one that has ended is given back as it is."""
    state = state_of(request)
    row = await _find(state, principal, response_id)
    if not row.is_background:
        raise refused("only a response in the background can be cancelled", "response_id", "not_background")
    if row.status in _OPEN:
        await state.jobs.cancel(principal.owner, response_id)
        body = {**row.body, "status": "cancelled"}
        row = await stored.update_response(state.database, principal.owner, response_id, body) or row
    return json_response(row.body)


@router.delete("/{response_id}", responses={200: {"model": Deleted}})
async def delete(request: Request, response_id: str, principal: User) -> Response:
    """Delete it with its events; if it is still being written, it ends."""
    state = state_of(request)
    if not await stored.delete_response(state.database, principal.owner, response_id):
        raise not_found("response", response_id)
    await state.jobs.forget(principal.owner, response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.get("/{response_id}/input_items")
async def input_items(
    request: Request, response_id: str, principal: User, cursor: NewestFirst, include: Include
) -> Response:
    row = await _find(state_of(request), principal, response_id)
    return json_response(list_answer(*page_of(row.inputs, cursor)))


async def _find(state: State, principal: Principal, response_id: str) -> ResponseRow:
    row = await stored.find_response(state.database, principal.owner, response_id)
    if row is None:
        raise not_found("response", response_id)
    return row


async def _settled(state: State, row: ResponseRow) -> ResponseRow:
    """The response; one whose server died while it wrote, or before it could begin, has failed."""
    if row.status in _OPEN:
        job = await stored_jobs.find_job(state.database, row.owner, row.id)
        if job is None or job.status == stored_jobs.FAILED:
            error = {"code": "server_error", "message": "The server that wrote this response has ended"}
            body = {**row.body, "status": "failed", "error": error}
            return await stored.update_response(state.database, row.owner, row.id, body) or row
    return row


def _retold(row: ResponseRow) -> Job:
    """A job that has ended, with the events of a response whose own were not kept."""
    if row.status in _OPEN:
        raise refused("this response has no stream to follow", "stream", "not_streaming")
    job = Job(row.id, row.owner, "response", is_kept=False, num_readers=1, status=stored_jobs.DONE)
    job.events = [encode({**event, "sequence_number": i}) for i, event in enumerate(told_again(row.body))]
    return job
