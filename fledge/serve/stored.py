"""Stored chat completions: list, retrieve, label, delete, and the messages they were asked with."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from fledge.serve.auth import Principal, needs
from fledge.serve.chat_wire import ChatCompletion, ChatUpdate
from fledge.serve.errors import not_found
from fledge.serve.sse import json_response
from fledge.serve.state import state_of
from fledge.serve.wire import Answer, Deleted, OldestFirst, list_answer, page_of
from fledge.store import completions as stored
from fledge.store.tables import CompletionRow

router = APIRouter(prefix="/v1/chat/completions", tags=["chat"])

Reader = Annotated[Principal, Depends(needs("generate"))]
_LABEL = re.compile(r"metadata\[(.{1,64})\]")


class CompletionList(Answer):
    object: str
    data: list[ChatCompletion]
    first_id: str | None
    last_id: str | None
    has_more: bool


def show(row: CompletionRow) -> dict[str, Any]:
    return {**row.body, "metadata": row.labels or {}}


def labels_in(request: Request) -> dict[str, str]:
    """The pairs of `metadata[KEY]=VALUE` in the query."""
    pairs = ((_LABEL.fullmatch(name), value) for name, value in request.query_params.multi_items())
    return {match[1]: value for match, value in pairs if match}


@router.get("", responses={200: {"model": CompletionList}})
async def list_completions(
    request: Request,
    principal: Reader,
    cursor: OldestFirst,
    model: Annotated[str | None, Query(max_length=256)] = None,
) -> Response:
    database = state_of(request).database
    page = await stored.list_completions(database, principal.owner, model, labels_in(request), cursor)
    return json_response(list_answer([show(row) for row in page.rows], page.has_more))


@router.get("/{completion_id}", responses={200: {"model": ChatCompletion}})
async def retrieve(request: Request, completion_id: str, principal: Reader) -> Response:
    return json_response(show(await _find(request, principal, completion_id)))


@router.post("/{completion_id}", responses={200: {"model": ChatCompletion}})
async def update(request: Request, completion_id: str, body: ChatUpdate, principal: Reader) -> Response:
    database = state_of(request).database
    row = await stored.label_completion(database, principal.owner, completion_id, body.metadata)
    if row is None:
        raise not_found("chat completion", completion_id)
    return json_response(show(row))


@router.delete("/{completion_id}", responses={200: {"model": Deleted}})
async def delete(request: Request, completion_id: str, principal: Reader) -> Response:
    if not await stored.delete_completion(state_of(request).database, principal.owner, completion_id):
        raise not_found("chat completion", completion_id)
    return json_response({"id": completion_id, "object": "chat.completion.deleted", "deleted": True})


@router.get("/{completion_id}/messages")
async def messages(request: Request, completion_id: str, principal: Reader, cursor: OldestFirst) -> Response:
    row = await _find(request, principal, completion_id)
    shown = [_show_message(message) for message in row.messages]
    return json_response(list_answer(*page_of(shown, cursor)))


def _show_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as it was sent; parts stand beside the text that they amount to."""
    content = message.get("content")
    parts = content if isinstance(content, list) else None
    text = "".join(part.get("text") or "" for part in parts) if parts is not None else content
    return {"refusal": None, **message, "content": text, "content_parts": parts}


async def _find(request: Request, principal: Principal, completion_id: str) -> CompletionRow:
    row = await stored.find_completion(state_of(request).database, principal.owner, completion_id)
    if row is None:
        raise not_found("chat completion", completion_id)
    return row
