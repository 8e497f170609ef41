"""/v1/conversations: what was said, kept on the server, for responses that go on with it.

A response that names a conversation reads its items before its own, and adds its input and its output to it
(responses.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from fledge.serve.auth import Principal, needs
from fledge.serve.errors import not_found
from fledge.serve.responses_input import as_items
from fledge.serve.responses_wire import InputItem, notes_in
from fledge.serve.sse import json_response
from fledge.serve.state import State, state_of
from fledge.serve.wire import Answer, Deleted, FieldRule, Include, Metadata, NewestFirst, Wire, list_answer, obey
from fledge.store import conversations as stored
from fledge.store.pages import new_id, now
from fledge.store.tables import ConversationRow

router = APIRouter(prefix="/v1/conversations", tags=["conversations"])

User = Annotated[Principal, Depends(needs("generate"))]
Items = Annotated[list[InputItem], Field(max_length=20)]  # as published


class ConversationRequest(Wire):
    metadata: Metadata | None = None
    items: Items | None = None


class ConversationUpdate(Wire):
    metadata: Metadata | None


class ItemsRequest(Wire):
    items: Items


CONVERSATION_FIELDS = (
    FieldRule("metadata", "honoured", ""),
    FieldRule("items", "honoured", "messages, calls, their results and summaries; others are refused by name"),
)


class Conversation(Answer):
    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]


class ItemList(Answer):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


def show(row: ConversationRow) -> dict[str, Any]:
    shown = {"id": row.id, "object": "conversation", "created_at": row.created_at}
    return {**shown, "metadata": row.labels or {}}


@router.post("", responses={200: {"model": Conversation}})
async def create(request: Request, principal: User, body: ConversationRequest | None = None) -> Response:
    body = body or ConversationRequest()
    request.state.notes.update(obey(CONVERSATION_FIELDS, body, notes_in(body.items or [], "items")))
    row = ConversationRow(id=new_id("conv_"), created_at=now(), owner=principal.owner, labels=body.metadata)
    await stored.add_conversation(state_of(request).database, row, as_items(body.items or [], "items"))
    return json_response(show(row))


@router.get("/{conversation_id}", responses={200: {"model": Conversation}})
async def retrieve(request: Request, conversation_id: str, principal: User) -> Response:
    return json_response(show(await _find(state_of(request), principal, conversation_id)))


@router.post("/{conversation_id}", responses={200: {"model": Conversation}})
async def update(request: Request, conversation_id: str, body: ConversationUpdate, principal: User) -> Response:
    database = state_of(request).database
    row = await stored.label_conversation(database, principal.owner, conversation_id, body.metadata)
    if row is None:
        raise not_found("conversation", conversation_id)
    return json_response(show(row))


@router.delete("/{conversation_id}", responses={200: {"model": Deleted}})
async def delete(request: Request, conversation_id: str, principal: User) -> Response:
    """Delete it with its items; responses that belonged to it stay."""
    if not await stored.delete_conversation(state_of(request).database, principal.owner, conversation_id):
        raise not_found("conversation", conversation_id)
    return json_response({"id": conversation_id, "object": "conversation.deleted", "deleted": True})


@router.post("/{conversation_id}/items", responses={200: {"model": ItemList}})
async def add_items(
    request: Request, conversation_id: str, body: ItemsRequest, principal: User, include: Include
) -> Response:
    request.state.notes.update(obey((), body, notes_in(body.items, "items")))
    state = state_of(request)
    row = await _find(state, principal, conversation_id)
    items = as_items(body.items, "items")
    await stored.add_items(state.database, row.id, items)
    # An item that was there already has stayed as it was, and that is what is told of it.
    kept = [await stored.find_item(state.database, row.id, item["id"]) or item for item in items]
    return json_response(list_answer(kept, has_more=False))


@router.get("/{conversation_id}/items", responses={200: {"model": ItemList}})
async def list_items(
    request: Request, conversation_id: str, principal: User, cursor: NewestFirst, include: Include
) -> Response:
    state = state_of(request)
    row = await _find(state, principal, conversation_id)
    page = await stored.list_items(state.database, row.id, cursor)
    return json_response(list_answer([one.body for one in page.rows], page.has_more))


@router.get("/{conversation_id}/items/{item_id}")
async def retrieve_item(
    request: Request, conversation_id: str, item_id: str, principal: User, include: Include
) -> Response:
    state = state_of(request)
    row = await _find(state, principal, conversation_id)
    item = await stored.find_item(state.database, row.id, item_id)
    if item is None:
        raise not_found("item", item_id)
    return json_response(item)


@router.delete("/{conversation_id}/items/{item_id}", responses={200: {"model": Conversation}})
async def delete_item(request: Request, conversation_id: str, item_id: str, principal: User) -> Response:
    """Gives back the conversation, as published."""
    state = state_of(request)
    row = await _find(state, principal, conversation_id)
    if not await stored.delete_item(state.database, row.id, item_id):
        raise not_found("item", item_id)
    return json_response(show(row))


async def _find(state: State, principal: Principal, conversation_id: str) -> ConversationRow:
    row = await stored.find_conversation(state.database, principal.owner, conversation_id)
    if row is None:
        raise not_found("conversation", conversation_id)
    return row
