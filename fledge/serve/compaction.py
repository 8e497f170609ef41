"""POST /v1/responses/compact: a long conversation made short.

What the user and the system said stays word for word; all the rest becomes one item, a summary that the model itself
writes. The item is opaque as published, but holds no secret: it is the summary, encoded (responses_input.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fledge.serve.auth import Principal, needs
from fledge.serve.chat_messages import Toolbox
from fledge.serve.chat_wire import Sampling
from fledge.serve.engine import ServedModel
from fledge.serve.generation import Generation, Shape
from fledge.serve.jobs import Job
from fledge.serve.responses_input import Item, Reader, items_before, own_items, sealed_summary, to_conversation
from fledge.serve.responses_wire import INPUT_FIELD, EarlierContext
from fledge.serve.sse import awaited, json_response
from fledge.serve.state import State, state_of
from fledge.serve.wire import Answer, FieldRule, Name, obey
from fledge.store.pages import new_id, now
from fledge.types import Conversation

router = APIRouter(prefix="/v1/responses", tags=["responses"])

MAX_SUMMARY = 512  # tokens
WISH = "Summarise the conversation so far: what was asked, what was found, what is still open. Be brief."


class CompactRequest(EarlierContext):
    model: Name
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    service_tier: str | None = None
    image: dict[str, Any] | None = None


COMPACT_FIELDS = (
    FieldRule("model", "honoured", "writes the summary"),
    INPUT_FIELD,
    FieldRule("instructions", "honoured", "the model reads them before the conversation"),
    FieldRule("previous_response_id", "honoured", ""),
    FieldRule("conversation", "extension", "a conversation of /v1/conversations, which stays as it is"),
    FieldRule("prompt_cache_key", "inert", "equal beginnings of prompts are found without it"),
    FieldRule("prompt_cache_retention", "inert", "the cache keeps what it has room for"),
    FieldRule("prompt_cache_options", "inert", "the cache keeps what it has room for"),
    FieldRule("service_tier", "inert", "there is one tier, 'default'"),
    FieldRule("image", "inert", "says how images would be read; there are none"),
)


class Compaction(Answer):
    id: str
    object: Literal["response.compaction"]
    created_at: int
    output: list[dict[str, Any]]
    usage: dict[str, Any]


@router.post("/compact", responses={200: {"model": Compaction}})
async def compact(
    request: Request, body: CompactRequest, principal: Annotated[Principal, Depends(needs("generate"))]
) -> Response:
    request.state.notes.update(obey(COMPACT_FIELDS, body, body.inert_parts))
    state = state_of(request)
    notes: dict[str, str] = request.state.notes

    async def run(_: Job) -> dict[str, Any]:
        return await _compact(state, principal, body, notes)

    job = await state.jobs.start(principal.owner, "compaction", run)
    return json_response(await awaited(job, request))


async def _compact(state: State, principal: Principal, body: CompactRequest, notes: dict[str, str]) -> dict[str, Any]:
    database, owner = state.database, principal.owner
    items = [*await items_before(database, owner, body), *await own_items(database, owner, body)]
    conversation = to_conversation(body.instructions, items, Toolbox()).then("user", WISH)
    async with state.hub.use(principal.owner, body.model) as model:
        with Generation(state, principal, model, body.model, notes) as generation:
            summary = await _summary(generation, model, conversation)
    return {
        "id": new_id("resp_"),
        "object": "response.compaction",
        "created_at": now(),
        "output": [*_kept(items), _item(summary)],
        "usage": generation.usage.to_response(),
    }


async def _summary(generation: Generation, model: ServedModel, conversation: Conversation) -> str:
    """The likeliest one. Of a conversation that is too long the oldest messages are left out, as by `truncation`."""
    longest = MAX_SUMMARY if model.context is None else min(MAX_SUMMARY, model.context // 4)
    room = None if model.context is None else model.context - longest
    prompt = await Reader(model, room).prompt(conversation)
    asked = generation.plan(Sampling(model=generation.name, temperature=0), prompt, Shape(max(1, longest)))
    generation.charge([asked])
    return "".join([event.text async for event in generation.events(asked)]).strip()


def _kept(items: list[Item]) -> list[Item]:
    """What was said by those who ask; the summary stands for the rest, earlier summaries included."""
    return [item for item in items if item["type"] == "message" and item["role"] != "assistant"]


def _item(summary: str) -> Item:
    return {"type": "compaction", "id": new_id("cmp_"), "encrypted_content": sealed_summary(summary)}
