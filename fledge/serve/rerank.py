"""POST /rerank, /v1/rerank, /v2/rerank: which documents answer a query, in the shape of Jina and Cohere as vLLM has it.

A language model ranks by how well it could ask the query having read the document: the score is the mean probability a
token of the query, exp of the mean log p(query | document). Source: Sachan et al. 2022 (2204.07496), equation 2.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from fledge.serve.auth import Principal, needs
from fledge.serve.chat_wire import Sampling
from fledge.serve.engine import ServedModel
from fledge.serve.errors import refused
from fledge.serve.generation import Generation, Shape
from fledge.serve.jobs import Job
from fledge.serve.sse import awaited, json_response
from fledge.serve.state import State, state_of
from fledge.serve.wire import Answer, FieldRule, Name, Wire, obey
from fledge.store.pages import new_id
from fledge.types import Request as EngineRequest

router = APIRouter(tags=["rerank"])

MAX_DOCUMENTS = 1000
AT_ONCE = 32  # documents that one request has in the engine
FORM = "{document}\n\n"  # what the model reads before the query


class Document(Wire):
    text: str


class RerankRequest(Wire):
    model: Name
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    return_documents: bool = True
    max_tokens_per_doc: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    user: str | None = None


RERANK_FIELDS = (
    FieldRule("model", "honoured", "any model that is served"),
    FieldRule("query", "honoured", ""),
    FieldRule("documents", "honoured", 'texts, or {"text": ...}; 1,000 at most'),
    FieldRule("top_n", "honoured", "0 is as if not given: all"),
    FieldRule("return_documents", "honoured", "true if not given"),
    FieldRule("max_tokens_per_doc", "honoured", "a longer document is cut at its end"),
    FieldRule("truncate_prompt_tokens", "honoured", "vLLM's name for the same"),
    FieldRule("user", "inert", "the key says who asks"),
)


class Ranking(Answer):
    id: str
    model: str
    usage: dict[str, int]
    results: list[dict[str, Any]]


@router.post("/rerank", responses={200: {"model": Ranking}})
@router.post("/v1/rerank", responses={200: {"model": Ranking}})
@router.post("/v2/rerank", responses={200: {"model": Ranking}})
async def rerank(
    request: Request, body: RerankRequest, principal: Annotated[Principal, Depends(needs("generate"))]
) -> Response:
    request.state.notes.update(obey(RERANK_FIELDS, body))
    state = state_of(request)
    notes: dict[str, str] = request.state.notes

    async def run(_: Job) -> dict[str, Any]:
        return await _rank(state, principal, body, notes)

    job = await state.jobs.start(principal.owner, "rerank", run)
    return json_response(await awaited(job, request))


async def _rank(state: State, principal: Principal, body: RerankRequest, notes: dict[str, str]) -> dict[str, Any]:
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    async with state.hub.use(principal.owner, body.model) as model:
        query = await asyncio.to_thread(model.tokenizer.encode, body.query, within=True)
        prompts = await asyncio.to_thread(_prompts, model, body, texts, query)
        with Generation(state, principal, model, body.model, notes) as generation:
            shape = Shape(1, prompt_logprobs=0)
            asked = [generation.plan(Sampling(model=body.model, temperature=0), ids, shape) for ids in prompts]
            for request in asked:
                generation.charge([request])
            scores = await _scores(generation, asked, len(query))
            generation.usage.completion = 0  # the token that had to be drawn is nobody's
    order = sorted(range(len(texts)), key=lambda i: (-scores[i], i))[: body.top_n or None]
    shown = [{"document": {"text": texts[i]}} if body.return_documents else {} for i in order]
    results = [{"index": i, **told, "relevance_score": scores[i]} for i, told in zip(order, shown, strict=True)]
    used = generation.usage.prompt
    usage = {"prompt_tokens": used, "total_tokens": used}
    return {"id": new_id("rerank-"), "model": body.model, "usage": usage, "results": results}


def _prompts(model: ServedModel, body: RerankRequest, texts: Sequence[str], query: Sequence[int]) -> list[list[int]]:
    """Every document, cut if need be, with the query behind it; 400 if the query alone leaves no room for one."""
    start = [model.tokenizer.end_of_text_id]
    room = None if model.context is None else model.context - len(query) - len(start) - 1
    if room is not None and room < 1:
        raise refused("the query is longer than the model's context", "query", "context_length_exceeded")
    limits = [limit for limit in (body.max_tokens_per_doc, body.truncate_prompt_tokens, room) if limit is not None]
    most = min(limits) if limits else None
    return [[*start, *model.tokenizer.encode(FORM.format(document=text))[:most], *query] for text in texts]


async def _scores(generation: Generation, asked: Sequence[EngineRequest], num_query: int) -> list[float]:
    """In the order of the documents; some at a time, so that others' requests come in between."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def score(request: EngineRequest) -> float:
        async with slots:
            told = [event.prompt async for event in generation.events(request) if event.prompt]
        logprobs = [one.logprob for one in told[0][-num_query:]]
        return math.exp(sum(logprobs) / len(logprobs))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(score(request)) for request in asked]
    return [task.result() for task in tasks]
