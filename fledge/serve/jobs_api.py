"""/v1/jobs: come back to a generation. Its events from any number on, how it stands, and its end.

Of our own making; the id is in the header `x-fledge-job` of every stream. Jobs that were to be kept
(`x-fledge-keep: true`, or `background` of /v1/responses) can be come back to for a day.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from starlette.responses import Response

from fledge.serve.auth import Principal, needs
from fledge.serve.errors import not_found
from fledge.serve.sse import EventStream, json_response
from fledge.serve.state import state_of
from fledge.store.jobs import find_job

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

Owner = Annotated[Principal, Depends(needs("generate"))]


@router.get("/{job_id}")
async def retrieve(request: Request, job_id: str, principal: Owner) -> Response:
    state = state_of(request)
    job = state.jobs.find(principal.owner, job_id)
    if job is not None:
        return json_response(_show(job.id, job.kind, job.status))
    row = await find_job(state.database, principal.owner, job_id)
    if row is None:
        raise not_found("job", job_id)
    return json_response(_show(row.id, row.kind, row.status))


@router.get("/{job_id}/events")
async def events(
    request: Request,
    job_id: str,
    principal: Owner,
    after: Annotated[int | None, Query(ge=-1, lt=2**53, description="the number of the last event you have")] = None,
    last_event_id: Annotated[int | None, Header(ge=-1, lt=2**53)] = None,
) -> Response:
    """The job's stream from behind an event on; `Last-Event-ID` says the same as `after`."""
    job = await state_of(request).jobs.rejoin(principal.owner, job_id)
    if job is None:
        raise not_found("job", job_id)
    last = after if after is not None else last_event_id
    return EventStream(job, start=0 if last is None else last + 1, is_named=job.kind == "response", is_numbered=True)


@router.post("/{job_id}/cancel")
async def cancel(request: Request, job_id: str, principal: Owner) -> Response:
    """End it; what it has said stays in its log."""
    state = state_of(request)
    if not await state.jobs.cancel(principal.owner, job_id):
        known = state.jobs.find(principal.owner, job_id) or await find_job(state.database, principal.owner, job_id)
        if known is None:
            raise not_found("job", job_id)
        return json_response(_show(known.id, known.kind, known.status))
    return json_response({"id": job_id, "object": "job", "status": "cancelled"})


def _show(job_id: str, kind: str, status: str) -> dict[str, Any]:
    return {"id": job_id, "object": "job", "kind": kind, "status": status}
