"""/v1/batches: many requests in one file, answered when there is time.

Each line goes through the same app as a request from outside, with the key that made the batch (batches_run.py); so
what holds for the live routes holds here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field, StringConstraints
from starlette.responses import Response

from fledge.serve.auth import Principal, needs
from fledge.serve.errors import not_found, refused
from fledge.serve.files import MAX_SECONDS, MIN_SECONDS, require_file
from fledge.serve.sse import json_response
from fledge.serve.state import State, state_of
from fledge.serve.wire import After, Answer, FieldRule, Limit, Metadata, Wire, list_answer, obey
from fledge.store import batches as stored
from fledge.store.pages import Cursor, new_id, now
from fledge.store.tables import BatchRow

router = APIRouter(prefix="/v1/batches", tags=["batches"])

Owner = Annotated[Principal, Depends(needs("generate"))]
ENDPOINTS = ("/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/completions", "/v1/moderations")
WINDOW_SECONDS = 24 * 3600
_TIMES = (
    *("in_progress_at", "finalizing_at", "completed_at", "failed_at"),
    *("expired_at", "cancelling_at", "cancelled_at"),
)


class Expiry(Wire):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_SECONDS, le=MAX_SECONDS)]


class BatchRequest(Wire):
    input_file_id: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    endpoint: str
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: Expiry | None = None


BATCH_FIELDS = (
    FieldRule("input_file_id", "honoured", "a file of purpose `batch`; its lines are looked through before any is run"),
    FieldRule("endpoint", "honoured", ", ".join(f"`{endpoint}`" for endpoint in ENDPOINTS)),
    FieldRule("completion_window", "honoured", "what is not answered by then is in the error file"),
    FieldRule("metadata", "honoured", ""),
    FieldRule("output_expires_after", "honoured", ""),
)


class BatchObject(Answer):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None = None
    errors: dict[str, Any] | None = None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    expires_at: int | None = None
    request_counts: dict[str, int]
    usage: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None


class BatchList(Answer):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def show(row: BatchRow) -> dict[str, Any]:
    """What is not known yet is left out, as published."""
    shown = {
        "id": row.id,
        "object": "batch",
        "endpoint": row.endpoint,
        "input_file_id": row.input_file_id,
        "completion_window": row.completion_window,
        "status": row.status,
        "created_at": row.created_at,
        "request_counts": row.counts,
        "metadata": row.labels,
    }
    further = {
        "model": row.extra.get("model"),
        "errors": row.errors,
        "output_file_id": row.output_file_id,
        "error_file_id": row.error_file_id,
        "expires_at": row.expires_at,
        "usage": row.extra.get("usage"),
        **{name: row.times.get(name) for name in _TIMES},
    }
    return {**shown, **{name: value for name, value in further.items() if value is not None}}


@router.post("", responses={200: {"model": BatchObject}})
async def create(request: Request, body: BatchRequest, principal: Owner) -> Response:
    request.state.notes.update(obey(BATCH_FIELDS, body))
    state = state_of(request)
    if body.endpoint not in ENDPOINTS:
        raise refused(f"the endpoint of a batch is one of {', '.join(ENDPOINTS)}", "endpoint", "invalid_endpoint")
    await require_file(state, principal, body.input_file_id, "input_file_id", "batch")
    extra: dict[str, Any] = {"key_id": principal.key_id}
    if body.output_expires_after is not None:
        extra["expires_after"] = body.output_expires_after.seconds
    made_at = now()
    row = BatchRow(
        id=new_id("batch_"),
        created_at=made_at,
        owner=principal.owner,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        status="validating",
        expires_at=made_at + WINDOW_SECONDS,
        times={},
        counts={"total": 0, "completed": 0, "failed": 0},
        extra=extra,
        labels=body.metadata,
    )
    await stored.add_batch(state.database, row)
    return json_response(show(row))


@router.get("", responses={200: {"model": BatchList}})
async def list_batches(request: Request, principal: Owner, after: After = None, limit: Limit = 20) -> Response:
    """Newest first."""
    page = await stored.list_batches(state_of(request).database, principal.owner, Cursor(limit, "desc", after))
    return json_response(list_answer([show(row) for row in page.rows], page.has_more))


@router.get("/{batch_id}", responses={200: {"model": BatchObject}})
async def retrieve(request: Request, batch_id: str, principal: Owner) -> Response:
    return json_response(show(await _find(state_of(request), principal, batch_id)))


@router.post("/{batch_id}/cancel", responses={200: {"model": BatchObject}})
async def cancel(request: Request, batch_id: str, principal: Owner) -> Response:
    """No further line is begun; what has been answered is in the files."""
    state = state_of(request)
    row = await stored.cancel_batch(state.database, principal.owner, batch_id)
    if row is None:
        row = await _find(state, principal, batch_id)
        if row.status not in stored.OPEN:
            raise refused(f"The batch is {row.status} already", "batch_id", "invalid_batch_status")
    return json_response(show(row))


async def _find(state: State, principal: Principal, batch_id: str) -> BatchRow:
    row = await stored.find_batch(state.database, principal.owner, batch_id)
    if row is None:
        raise not_found("batch", batch_id)
    return row
