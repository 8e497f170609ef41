"""POST /v1/moderations: what the moderation model says of texts.

Source: openapi 2.3.0, `CreateModerationRequest` and `CreateModerationResponse`. The model is the one that the server
was started with, under its own name and those of the published document.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from fledge.safety.categories import MINORS, NAMES
from fledge.safety.classifier import Verdict
from fledge.serve.auth import Principal, needs
from fledge.serve.errors import ApiError, refused
from fledge.serve.moderation import Moderator, no_moderation
from fledge.serve.sse import json_response
from fledge.serve.state import state_of
from fledge.serve.wire import Answer, FieldRule, Wire, obey
from fledge.store.pages import new_id

router = APIRouter(prefix="/v1/moderations", tags=["moderations"])

PUBLISHED_NAMES = (
    "omni-moderation-latest",
    "omni-moderation-2024-09-26",
    "text-moderation-latest",
    "text-moderation-stable",
)
MAX_INPUTS, MAX_CHARS = 2048, 1_000_000


class ModerationPart(Wire):
    """Text; images are known by their name and refused."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class ModerationRequest(Wire):
    input: (
        str
        | Annotated[list[str], Field(max_length=MAX_INPUTS)]
        | Annotated[list[ModerationPart], Field(max_length=MAX_INPUTS)]
    )
    model: Annotated[str, Field(max_length=256)] | None = None


class ModerationResult(Answer):
    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text"]]]


class ModerationAnswer(Answer):
    id: str
    model: str
    results: list[ModerationResult]


MODERATION_FIELDS = (
    FieldRule(
        "input", "honoured", "a text, a list of texts with a result each, or parts with one result; images are refused"
    ),
    FieldRule("model", "honoured", "the server's own, or a published name for it"),
)


@router.post("", responses={200: {"model": ModerationAnswer}})
async def create(
    request: Request, body: ModerationRequest, principal: Annotated[Principal, Depends(needs("generate"))]
) -> Response:
    request.state.notes.update(obey(MODERATION_FIELDS, body))
    moderator = state_of(request).moderator
    if moderator is None:
        raise no_moderation()
    if body.model is not None:
        require_moderator(moderator, body.model, "model")
    texts = _texts(body)
    principal.budgets.charge("tokens", await moderator.num_tokens(texts))
    request.state.notes.update(principal.budgets.headers())
    verdicts = await moderator.judge(texts)
    results = [show_verdict(verdict) for verdict in verdicts]
    return json_response({"id": new_id("modr-"), "model": moderator.name, "results": results})


def require_moderator(moderator: Moderator, name: str, place: str) -> None:
    """404 for a name that is neither the moderation model's own nor a published one."""
    if name not in (moderator.name, *PUBLISHED_NAMES):
        message = f"'{name[:200]}' is no moderation model; this server's is '{moderator.name}'"
        raise ApiError(404, message, param=place, code="model_not_found", kind="invalid_request_error")


def _texts(body: ModerationRequest) -> list[str]:
    """One text a result: the parts of a list of parts are one text."""
    given = body.input
    texts = [given] if isinstance(given, str) else [part for part in given if isinstance(part, str)]
    if not isinstance(given, str) and not texts:
        parts = [_part(part, i) for i, part in enumerate(given) if isinstance(part, ModerationPart)]
        if not parts:
            raise refused("there is nothing to judge: the list is empty", "input", "invalid_value")
        texts = ["\n".join(parts)]
    if sum(map(len, texts)) > MAX_CHARS:
        raise refused(f"at most {MAX_CHARS:,} characters are judged in one request", "input", "string_above_max_length")
    return texts


def _part(part: ModerationPart, i: int) -> str:
    if part.type != "text":
        message = f"the moderation model reads text only, not '{part.type[:50]}'"
        raise refused(message, f"input[{i}].type", "unsupported_content")
    if part.text is None:
        raise refused("a part of type 'text' needs its text", f"input[{i}].text", "missing_required_parameter")
    return part.text


def show_verdict(verdict: Verdict) -> dict[str, Any]:
    """A result as the published lists have it. The category that is never learnt applies to no input."""
    return {
        "flagged": verdict.is_flagged,
        "categories": {name: name in verdict.flagged for name in NAMES},
        "category_scores": dict(verdict.scores),
        "category_applied_input_types": {name: [] if name == MINORS else ["text"] for name in NAMES},
    }
