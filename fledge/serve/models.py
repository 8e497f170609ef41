"""GET and DELETE /v1/models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fledge.serve.auth import Principal, needs
from fledge.serve.errors import ApiError, not_found
from fledge.serve.hub import ModelEntry
from fledge.serve.sse import json_response
from fledge.serve.state import state_of
from fledge.serve.wire import Answer, Deleted

router = APIRouter(prefix="/v1/models", tags=["models"])


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    shutdown_date: str | None = None


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


def show(entry: ModelEntry) -> dict[str, Any]:
    return {"id": entry.name, "object": "model", "created": entry.created_at, "owned_by": entry.owned_by}


@router.get("", responses={200: {"model": ModelList}})
async def list_models(request: Request, principal: Annotated[Principal, Depends(needs("models"))]) -> Response:
    entries = await state_of(request).hub.available(principal.owner)
    return json_response({"object": "list", "data": [show(entry) for entry in entries]})


@router.get("/{model:path}", responses={200: {"model": Model}})
async def retrieve(request: Request, model: str, principal: Annotated[Principal, Depends(needs("models"))]) -> Response:
    return json_response(show(await state_of(request).hub.find(principal.owner, model)))


@router.delete("/{model:path}", responses={200: {"model": Deleted}})
async def delete(request: Request, model: str, principal: Annotated[Principal, Depends(needs("models"))]) -> Response:
    """Forget a fine-tuned model of one's own."""
    hub = state_of(request).hub
    entry = await hub.find(principal.owner, model)
    if not entry.is_deletable:
        raise ApiError(403, f"The model '{model[:200]}' is not yours to delete", param="model", code="not_allowed")
    if not await hub.delete(principal.owner, model):
        raise not_found("model", model)
    return json_response({"id": model, "object": "model", "deleted": True})
