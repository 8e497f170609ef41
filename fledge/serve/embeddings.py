"""POST /v1/embeddings: texts as vectors, the mean of the model's hidden states, of length 1."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request
from numpy.typing import NDArray
from pydantic import Field
from starlette.responses import Response

from fledge.serve.auth import Principal, needs
from fledge.serve.completions_wire import TextsOrTokens, as_prompts
from fledge.serve.engine import ServedModel
from fledge.serve.errors import refused
from fledge.serve.sse import awaited, json_response
from fledge.serve.state import State, state_of
from fledge.serve.usage import Usage
from fledge.serve.wire import Answer, FieldRule, Name, Wire, obey

router = APIRouter(prefix="/v1/embeddings", tags=["embeddings"])

# The published bounds.
MAX_TOKENS, MAX_REQUEST_TOKENS = 8192, 300_000


class EmbeddingRequest(Wire):
    input: TextsOrTokens
    model: Name
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    user: str | None = None


class EmbeddingList(Answer):
    object: Literal["list"]
    data: list[dict[str, Any]]
    model: str
    usage: dict[str, int]


EMBEDDING_FIELDS = (
    FieldRule("input", "honoured", "a text, tokens, or a list of either"),
    FieldRule("model", "honoured", "any model that is served"),
    FieldRule("encoding_format", "honoured", "base64 holds little-endian float32"),
    FieldRule("dimensions", "honoured", "the first so many, made length 1 again; at most what the model has"),
    FieldRule("user", "inert", "the key says who asks"),
)


@router.post("", responses={200: {"model": EmbeddingList}})
async def create(
    request: Request, body: EmbeddingRequest, principal: Annotated[Principal, Depends(needs("generate"))]
) -> Response:
    request.state.notes.update(obey(EMBEDDING_FIELDS, body))
    state = state_of(request)
    job = await state.jobs.start(principal.owner, "embedding", lambda _: _embed(state, principal, body, request))
    return json_response(await awaited(job, request))


async def _embed(state: State, principal: Principal, body: EmbeddingRequest, request: Request) -> dict[str, Any]:
    began = time.perf_counter()
    async with state.hub.use(principal.owner, body.model) as model:
        if model.adapter is not None:
            raise refused("embeddings are a model's own; name the model without its adapter", "model", "invalid_value")
        rows = await asyncio.to_thread(_rows, model, body)
        num_tokens = sum(map(len, rows))
        principal.budgets.charge("tokens", num_tokens)
        request.state.notes.update(principal.budgets.headers())
        vectors = _cut(await model.engine.embed(rows), body.dimensions)
    state.metrics.generation(model.label, Usage(prompt=num_tokens), time.perf_counter() - began)
    data = [
        {"object": "embedding", "index": i, "embedding": _spell(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


def _rows(model: ServedModel, body: EmbeddingRequest) -> list[list[int]]:
    """The ids of every input; 400 names the one that is empty, too long, or no text of this model's."""
    most = MAX_TOKENS if model.context is None else min(MAX_TOKENS, model.context)
    rows = []
    for i, given in enumerate(as_prompts(body.input)):
        where = f"input[{i}]"
        if isinstance(given, str):
            given = [model.tokenizer.end_of_text_id, *model.tokenizer.encode(given)] if given else []
        if not given:
            raise refused("an input must hold at least one character", where, "invalid_value")
        if len(given) > most:
            message = f"an input has {len(given)} tokens, at most {most} are taken"
            raise refused(message, where, "context_length_exceeded")
        if max(given) >= model.tokenizer.vocab_size:
            message = f"no token has the id {max(given)}; ids go to {model.tokenizer.vocab_size - 1}"
            raise refused(message, where, "invalid_value")
        rows.append(given)
    if sum(map(len, rows)) > MAX_REQUEST_TOKENS:
        raise refused(f"the inputs have more than {MAX_REQUEST_TOKENS} tokens together", "input", "too_many_tokens")
    return rows


def _cut(vectors_ND: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """The first `dimensions` of every vector, of length 1 again."""
    if dimensions is None:
        return vectors_ND
    if dimensions > vectors_ND.shape[1]:
        raise refused(f"the model has {vectors_ND.shape[1]} dimensions", "dimensions", "invalid_value")
    cut_ND = vectors_ND[:, :dimensions]
    length_N1 = np.linalg.norm(cut_ND, axis=1, keepdims=True)
    return np.asarray(cut_ND / np.maximum(length_N1, np.finfo(np.float32).tiny), np.float32)


def _spell(vector: NDArray[np.float32], encoding: str | None) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
