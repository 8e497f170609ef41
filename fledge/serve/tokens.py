"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them: how a model reads texts and conversations."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field
from starlette.responses import Response

from fledge.errors import TokenizerError
from fledge.serve.auth import Principal, needs
from fledge.serve.chat_messages import make_toolbox, notes_in, to_conversation
from fledge.serve.chat_wire import ChatMessage, ToolSpec
from fledge.serve.completions_wire import TokenId
from fledge.serve.engine import ServedModel
from fledge.serve.errors import refused
from fledge.serve.sse import json_response
from fledge.serve.state import state_of
from fledge.serve.wire import Answer, Name, Wire
from fledge.text.template import TemplateRenderer

router = APIRouter(tags=["tokens"])

User = Annotated[Principal, Depends(needs("generate"))]


class TokenizeRequest(Wire):
    """A text or a conversation. `add_special_tokens` begins a text as a document, as /v1/completions does. Without a
    model it is read by the server's first one."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Wire):
    model: Name | None = None
    tokens: list[TokenId]


class Tokenized(Answer):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


@router.post("/tokenize", responses={200: {"model": Tokenized}})
async def tokenize(request: Request, body: TokenizeRequest, principal: User) -> Response:
    if (body.prompt is None) == (body.messages is None):
        raise refused("give either 'prompt' or 'messages'", "prompt", "invalid_value")
    hub = state_of(request).hub
    async with hub.use(principal.owner, hub.name_for(body.model)) as model:
        ids = await asyncio.to_thread(_ids, model, body)
        pieces = model.tokenizer.pieces(ids) if body.return_token_strs else None
    return json_response({"count": len(ids), "max_model_len": model.context, "tokens": ids, "token_strs": pieces})


def _ids(model: ServedModel, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        notes_in(body.messages)
        specs = [tool.function for tool in body.tools or () if tool.function is not None]
        return list(model.renderer.prompt(to_conversation(body.messages, make_toolbox(specs, None, True))))
    start = [model.tokenizer.end_of_text_id] if body.add_special_tokens else []
    return start + model.tokenizer.encode(body.prompt or "")


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest, principal: User) -> Response:
    hub = state_of(request).hub
    async with hub.use(principal.owner, hub.name_for(body.model)) as model:
        try:
            return json_response({"prompt": model.tokenizer.decode(body.tokens)})
        except TokenizerError as error:
            raise refused(str(error), "tokens", "invalid_value") from None


@router.get("/tokenizer_info")
async def tokenizer_info(
    request: Request, principal: User, model: Annotated[str | None, Query(max_length=256)] = None
) -> Response:
    """Without `model`, of the server's first one."""
    hub = state_of(request).hub
    name = hub.name_for(model)
    async with hub.use(principal.owner, name) as served:
        return json_response(_describe(name, served))


def _describe(name: str, served: ServedModel) -> dict[str, Any]:
    tokenizer, renderer = served.tokenizer, served.renderer
    special = {tokenizer.pieces([i])[0]: i for i in sorted(tokenizer.special_ids)}
    start, pad = tokenizer.pieces([tokenizer.end_of_text_id, tokenizer.pad_id])
    return {
        "model": name,
        # As the published tokenizer files name them. Their ids stand below: as text they are read as text.
        "bos_token": start,
        "eos_token": start,
        "pad_token": pad,
        "vocab_size": tokenizer.vocab_size,
        "hash": tokenizer.hash,
        "special_tokens": special,
        "stop_token_ids": sorted(renderer.stop_ids),
        "max_model_len": served.context,
        "chat_template": renderer.template.source if isinstance(renderer, TemplateRenderer) else None,
    }
