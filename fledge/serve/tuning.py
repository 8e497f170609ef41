"""/v1/fine_tuning/jobs: begin one, watch it, stop it for a while or for good.

Nothing trains in here: a job is a row, and the worker (`fledge worker`, recipes/worker.py) runs it. What its owner
wants of a job that runs stands in the row, and the worker obeys at its next step.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from fledge.rl.graders import GraderError, check
from fledge.serve.auth import Principal, needs
from fledge.serve.errors import not_found, refused
from fledge.serve.files import require_file
from fledge.serve.sse import json_response
from fledge.serve.state import State, state_of
from fledge.serve.stored import labels_in
from fledge.serve.tuning_wire import (
    TUNING_FIELDS,
    TuningCheckpoints,
    TuningEvents,
    TuningJob,
    TuningJobs,
    TuningRequest,
    resolved,
    show_checkpoint,
    show_event,
    show_job,
)
from fledge.serve.wire import After, Limit, list_answer, obey
from fledge.store import tuning
from fledge.store.pages import Cursor, new_id, now
from fledge.store.tables import TuningJobRow

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

Owner = Annotated[Principal, Depends(needs("tuning"))]
_OPEN = (*tuning.WAITING, "running")
_INERT = ("reasoning_effort", "eval_interval", "eval_samples")  # of reinforcement


@router.post("", responses={200: {"model": TuningJob}})
async def create(request: Request, body: TuningRequest, principal: Owner) -> Response:
    state = state_of(request)
    request.state.notes.update(_inert(body))
    method = _method(body)
    path = await state.hub.path_of(principal.owner, body.model)
    await require_file(state, principal, body.training_file, "training_file", "fine-tune")
    if body.validation_file is not None:
        await require_file(state, principal, body.validation_file, "validation_file", "fine-tune")
    row = TuningJobRow(
        id=new_id("ftjob-"),
        created_at=now(),
        owner=principal.owner,
        status="validating_files",
        model=body.model,
        base_path=str(path),
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        method=method,
        integrations=_given(body),
        labels=body.metadata,
        result_files=[],
    )
    await tuning.add_tuning_job(state.database, row)
    await tuning.add_tuning_event(state.database, row.id, f"Created fine-tuning job: {row.id}")
    return json_response(show_job(row))


@router.get("", responses={200: {"model": TuningJobs}})
async def list_jobs(request: Request, principal: Owner, after: After = None, limit: Limit = 20) -> Response:
    """Newest first; `metadata[KEY]=VALUE` picks."""
    cursor = Cursor(limit, "desc", after)
    page = await tuning.list_tuning_jobs(state_of(request).database, principal.owner, labels_in(request), cursor)
    return json_response({"object": "list", "data": [show_job(row) for row in page.rows], "has_more": page.has_more})


@router.get("/{fine_tuning_job_id}", responses={200: {"model": TuningJob}})
async def retrieve(request: Request, fine_tuning_job_id: str, principal: Owner) -> Response:
    return json_response(show_job(await _find(state_of(request), principal, fine_tuning_job_id)))


@router.get("/{fine_tuning_job_id}/events", responses={200: {"model": TuningEvents}})
async def events(
    request: Request, fine_tuning_job_id: str, principal: Owner, after: After = None, limit: Limit = 20
) -> Response:
    """Newest first."""
    state = state_of(request)
    row = await _find(state, principal, fine_tuning_job_id)
    page = await tuning.list_tuning_events(state.database, row.id, Cursor(limit, "desc", after))
    return json_response({"object": "list", "data": [show_event(one) for one in page.rows], "has_more": page.has_more})


@router.get("/{fine_tuning_job_id}/checkpoints", responses={200: {"model": TuningCheckpoints}})
async def checkpoints(
    request: Request,
    fine_tuning_job_id: str,
    principal: Owner,
    after: After = None,
    limit: Annotated[int, Query(ge=0, le=100)] = 10,
) -> Response:
    """Newest first; each is a model that answers under its own name."""
    state = state_of(request)
    row = await _find(state, principal, fine_tuning_job_id)
    page = await tuning.list_tuning_checkpoints(state.database, row.id, Cursor(limit, "desc", after))
    return json_response(list_answer([show_checkpoint(one) for one in page.rows], page.has_more))


@router.post("/{fine_tuning_job_id}/cancel", responses={200: {"model": TuningJob}})
async def cancel(request: Request, fine_tuning_job_id: str, principal: Owner) -> Response:
    """End it for good: at once if nobody has begun it, else at its next step."""
    return await _ask(request, fine_tuning_job_id, principal, "cancel")


@router.post("/{fine_tuning_job_id}/pause", responses={200: {"model": TuningJob}})
async def pause(request: Request, fine_tuning_job_id: str, principal: Owner) -> Response:
    """Let it stand where it is until `resume`; it goes on bit for bit."""
    return await _ask(request, fine_tuning_job_id, principal, "pause")


@router.post("/{fine_tuning_job_id}/resume", responses={200: {"model": TuningJob}})
async def resume(request: Request, fine_tuning_job_id: str, principal: Owner) -> Response:
    """Go on. A job that runs goes on as it is, a pause that was asked for forgotten."""
    return await _ask(request, fine_tuning_job_id, principal, "resume")


async def _ask(request: Request, job_id: str, principal: Principal, what: str) -> Response:
    """The job after what was asked of it; 400 for one that has ended, or is about to by its owner's wish."""
    state = state_of(request)
    row = await _find(state, principal, job_id)
    for when, changes in _CHANGES[what]:
        asked = await tuning.ask_of_job(state.database, principal.owner, job_id, when=when, **changes)
        if asked is not None:
            await tuning.add_tuning_event(state.database, job_id, _TOLD[what])
            return json_response(show_job(asked))
    row = await _find(state, principal, job_id)
    if row.status in tuning.ENDED:
        raise refused(f"The job has {row.status} already", "fine_tuning_job_id", "invalid_job_status")
    if row.wanted == "cancel" and what != "cancel":
        raise refused("The job is being cancelled", "fine_tuning_job_id", "invalid_job_status")
    return json_response(show_job(row))


# In which states what is done; the first that fits.
_CHANGES: dict[str, tuple[tuple[tuple[str, ...], dict[str, Any]], ...]] = {
    "cancel": ((tuning.WAITING, {"status": "cancelled"}), (("running",), {"wanted": "cancel"})),
    "pause": ((("validating_files", "queued"), {"status": "paused"}), (("running",), {"wanted": "pause"})),
    "resume": ((("paused",), {"status": "validating_files"}), (("running", "queued"), {"wanted": None})),
}
_TOLD = {"cancel": "Cancellation requested", "pause": "Pause requested", "resume": "Resume requested"}


def _inert(body: TuningRequest) -> dict[str, str]:
    notes = obey(TUNING_FIELDS, body)
    method = body.method.reinforcement if body.method is not None else None
    numbers = method.hyperparameters if method is not None else None
    inert = [name for name in _INERT if numbers is not None and name in numbers.model_fields_set]
    if inert:
        told = [f"method.reinforcement.hyperparameters.{name}" for name in inert]
        notes["x-fledge-inert"] = ", ".join([*filter(None, [notes.get("x-fledge-inert")]), *told])
    return notes


def _given(body: TuningRequest) -> list[dict[str, Any]] | None:
    """The integrations as they were asked for: published are `tags` or none, never null."""
    asked = body.integrations
    return None if asked is None else [one.model_dump(exclude_none=True) for one in asked]


def _method(body: TuningRequest) -> dict[str, Any]:
    """The method as it is kept; 400 for a grader that cannot be used."""
    method = resolved(body)
    if method["type"] == "reinforcement":
        grader = method["reinforcement"].get("grader")
        place = "method.reinforcement.grader"
        if grader is None:
            raise refused(f"Missing required parameter: '{place}'", place, "missing_required_parameter")
        try:
            check(grader, place)
        except GraderError as error:
            raise refused(error.message, error.param, error.kind) from None
    return method


async def _find(state: State, principal: Principal, job_id: str) -> TuningJobRow:
    row = await tuning.find_tuning_job(state.database, principal.owner, job_id)
    if row is None:
        raise not_found("fine-tuning job", job_id)
    return row
