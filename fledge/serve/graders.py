"""/v1/fine_tuning/alpha/graders: try a grader on one answer, or only look whether it can be used.

Graders run in the limited processes of rl/judge.py, those of fine-tuning jobs as well; see rl/graders.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from fledge.rl.graders import GraderError, check, combined, parts_of
from fledge.rl.judge import Verdict, Verifier
from fledge.serve.auth import Principal, needs
from fledge.serve.errors import refused
from fledge.serve.sse import awaited, json_response
from fledge.serve.state import State, state_of
from fledge.serve.wire import Answer, FieldRule, Wire

router = APIRouter(prefix="/v1/fine_tuning/alpha/graders", tags=["fine-tuning"])

Owner = Annotated[Principal, Depends(needs("tuning"))]
# The published errors that are flags; "other_error" is what none of them fits.
_FLAGS = (
    *("formula_parse_error", "sample_parse_error", "truncated_observation_error", "unresponsive_reward_error"),
    *("invalid_variable_error", "other_error", "python_grader_server_error", "python_grader_runtime_error"),
    *("model_grader_server_error", "model_grader_refusal_error", "model_grader_parse_error"),
)
_DETAILS = ("python_grader_server_error_type", "python_grader_runtime_error_details")


class RunRequest(Wire):
    grader: dict[str, Any]
    model_sample: Annotated[str, Field(max_length=1 << 20)]
    item: dict[str, Any] | None = None


class ValidateRequest(Wire):
    grader: dict[str, Any]


class GraderResult(Answer):
    reward: float
    metadata: dict[str, Any]
    sub_rewards: dict[str, Any]
    model_grader_token_usage_per_model: dict[str, Any]


class GraderAnswer(Answer):
    grader: dict[str, Any]


RUN_FIELDS = (
    FieldRule("grader", "honoured", "string_check, text_similarity (not cosine), python, multi; others are refused"),
    FieldRule("model_sample", "honoured", ""),
    FieldRule("item", "honoured", ""),
)
VALIDATE_FIELDS = RUN_FIELDS[:1]


@router.post("/validate", responses={200: {"model": GraderAnswer}})
async def validate(request: Request, body: ValidateRequest, _: Owner) -> Response:
    _require_usable(body.grader)
    programs = {name: part for name, part in parts_of(body.grader).items() if part["type"] == "python"}
    for verdict in (await _ask(state_of(request), programs, "", {}, {"check": True})).values():
        if verdict.score is None:
            kind, _separator, message = (verdict.reason or "").partition(": ")
            raise refused(message or kind, "grader", kind if message else "invalid_grader")
    return json_response({"grader": body.grader})


@router.post("/run", responses={200: {"model": GraderResult}})
async def run(request: Request, body: RunRequest, principal: Owner) -> Response:
    """The reward of one answer. A grader that fails is no error of the request: its errors stand in the answer."""
    _require_usable(body.grader)
    state = state_of(request)
    job = await state.jobs.start(principal.owner, "grader", lambda _: _graded(state, body))
    return json_response(await awaited(job, request))


async def _graded(state: State, body: RunRequest) -> dict[str, Any]:
    began = time.perf_counter()
    parts = parts_of(body.grader)
    verdicts = await _ask(state, parts, body.model_sample, body.item or {}, {})
    errors: dict[str, Any] = {**dict.fromkeys(_FLAGS, False), **dict.fromkeys(_DETAILS)}
    errors["model_grader_server_error_details"] = None
    for verdict in verdicts.values():
        if verdict.score is None:
            _note(errors, verdict.reason or "no verdict")
    scores = {name: verdict.score for name, verdict in verdicts.items() if verdict.score is not None}
    reward = 0.0
    if len(scores) == len(parts):
        try:
            reward = combined(body.grader, scores)
        except GraderError:
            errors["formula_parse_error"] = True
    metadata = {
        "name": body.grader["name"],
        "type": body.grader["type"],
        "errors": errors,
        "execution_time": time.perf_counter() - began,
        "scores": {name: verdict.score for name, verdict in verdicts.items()},
        "token_usage": None,
        "sampled_model_name": None,
    }
    sub_rewards = scores if body.grader["type"] == "multi" else {}
    told = {"reward": reward, "metadata": metadata, "sub_rewards": sub_rewards}
    return {**told, "model_grader_token_usage_per_model": {}}


def _require_usable(grader: Mapping[str, Any]) -> None:
    try:
        check(grader)
    except GraderError as error:
        raise refused(error.message, error.param, error.kind) from None


async def _ask(
    state: State,
    graders: Mapping[str, Mapping[str, Any]],
    answer: str,
    item: Mapping[str, Any],
    options: dict[str, Any],
) -> dict[str, Verdict]:
    """A verdict of each grader, each in a process of its own."""
    found = {}
    for name, grader in graders.items():
        verifier = Verifier("grader", {"grader": grader, **options})
        # The judge's own threads wait, so that a slow grader holds up nothing else.
        found[name] = await asyncio.wrap_future(state.judge.submit(verifier, answer, {"item": item}))
    return found


def _note(errors: dict[str, Any], reason: str) -> None:
    """Set the flag of a reason; what dies or hangs is the program's own fault."""
    kind, _, message = reason.partition(": ")
    if kind in _FLAGS:
        errors[kind] = True
    elif reason.startswith("no verdict within"):
        errors["unresponsive_reward_error"] = True
    elif reason.startswith("the process"):
        errors["python_grader_runtime_error"], message = True, reason
    elif reason.startswith("the sandbox"):
        errors["python_grader_server_error"], errors["python_grader_server_error_type"] = True, reason[:200]
    else:
        errors["other_error"] = True
    if errors["python_grader_runtime_error"] and errors["python_grader_runtime_error_details"] is None:
        errors["python_grader_runtime_error_details"] = message
