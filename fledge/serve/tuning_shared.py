"""/v1/fine_tuning/checkpoints/MODEL/permissions: who else may use a fine-tuned model or one of its checkpoints.

The published API grants to projects; here an owner of keys is a project (`fledge keys create --owner`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field, StringConstraints
from starlette.responses import Response

from fledge.serve.auth import Principal, needs
from fledge.serve.errors import not_found
from fledge.serve.sse import json_response
from fledge.serve.state import State, state_of
from fledge.serve.wire import After, Answer, Deleted, Wire, list_answer
from fledge.store import permissions
from fledge.store.models import find_own_model
from fledge.store.pages import Cursor
from fledge.store.tables import PermissionRow

router = APIRouter(prefix="/v1/fine_tuning/checkpoints", tags=["fine-tuning"])

Owner = Annotated[Principal, Depends(needs("tuning"))]
Project = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00]*$")]
_PLACE = "/{fine_tuned_model_checkpoint}/permissions"


class PermissionRequest(Wire):
    project_ids: Annotated[list[Project], Field(min_length=1, max_length=1000)]


class Permission(Answer):
    id: str
    object: Literal["checkpoint.permission"]
    created_at: int
    project_id: str


class Permissions(Answer):
    object: Literal["list"]
    data: list[Permission]
    first_id: str | None
    last_id: str | None
    has_more: bool


def show(row: PermissionRow) -> dict[str, Any]:
    shown = {"id": row.id, "object": "checkpoint.permission", "created_at": row.created_at}
    return {**shown, "project_id": row.project_id}


@router.post(_PLACE, responses={200: {"model": Permissions}})
async def create(
    request: Request, fine_tuned_model_checkpoint: str, body: PermissionRequest, principal: Owner
) -> Response:
    state = state_of(request)
    model = await _own(state, principal, fine_tuned_model_checkpoint)
    rows = await permissions.grant(state.database, principal.owner, model, body.project_ids)
    return json_response(list_answer([show(row) for row in rows], has_more=False))


@router.get(_PLACE, responses={200: {"model": Permissions}})
async def list_permissions(
    request: Request,
    fine_tuned_model_checkpoint: str,
    principal: Owner,
    project_id: Annotated[str | None, Query(max_length=255)] = None,
    after: After = None,
    limit: Annotated[int, Query(ge=0, le=100)] = 10,
    order: Literal["ascending", "descending"] = "descending",
) -> Response:
    state = state_of(request)
    model = await _own(state, principal, fine_tuned_model_checkpoint)
    cursor = Cursor(limit, "asc" if order == "ascending" else "desc", after)
    page = await permissions.list_permissions(state.database, principal.owner, model, project_id, cursor)
    return json_response(list_answer([show(row) for row in page.rows], page.has_more))


@router.delete(_PLACE + "/{permission_id}", responses={200: {"model": Deleted}})
async def delete(request: Request, fine_tuned_model_checkpoint: str, permission_id: str, principal: Owner) -> Response:
    state = state_of(request)
    model = await _own(state, principal, fine_tuned_model_checkpoint)
    if not await permissions.revoke(state.database, principal.owner, model, permission_id):
        raise not_found("permission", permission_id)
    return json_response({"id": permission_id, "object": "checkpoint.permission", "deleted": True})


async def _own(state: State, principal: Principal, name: str) -> str:
    if await find_own_model(state.database, principal.owner, name) is None:
        raise not_found("fine-tuned model", name)
    return name
