"""POST /v1/chat/completions.

The request is a conversation; text.chat makes it tokens, the engine answers, and the answer goes out as it comes or
whole. Everything happens in a job (jobs.py), so what cannot be used is an error before the stream begins.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from starlette.responses import Response

from fledge.serve.auth import Principal, needs
from fledge.serve.chat_answer import ChatChoice, Chunks
from fledge.serve.chat_messages import Toolbox, notes_in, to_conversation, to_grammar, to_toolbox
from fledge.serve.chat_wire import CHAT_FIELDS, ChatCompletion, ChatRequest
from fledge.serve.engine import ServedModel
from fledge.serve.errors import refused
from fledge.serve.generation import Generation, Shape
from fledge.serve.guarding import Guarding, written
from fledge.serve.jobs import Job
from fledge.serve.sse import awaited, encode, json_response, streamed
from fledge.serve.state import State, state_of
from fledge.serve.wire import obey
from fledge.store.completions import add_completion
from fledge.store.pages import new_id, now
from fledge.store.tables import CompletionRow
from fledge.types import Request as EngineRequest
from fledge.types import TokenEvent

router = APIRouter(prefix="/v1/chat/completions", tags=["chat"])

Keep = Annotated[bool, Header(alias="x-fledge-keep", description="go on although the client goes away")]


@router.post("", responses={200: {"model": ChatCompletion}})
async def create(
    request: Request,
    body: ChatRequest,
    principal: Annotated[Principal, Depends(needs("generate"))],
    is_kept: Keep = False,
) -> Response:
    request.state.notes.update(obey(CHAT_FIELDS, body, [*notes_in(body.messages), *body.inert_parts]))
    if body.top_logprobs is not None and not body.logprobs and body.top_logprobs > 0:
        raise refused("'top_logprobs' needs 'logprobs' to be true", "top_logprobs", "invalid_value")
    chat = Chat(state_of(request), principal, body, to_toolbox(body), request.state.notes)
    job = await chat.state.jobs.start(principal.owner, "chat.completion", chat.run, is_kept=is_kept)
    if body.stream:
        return await streamed(job)
    return json_response(await awaited(job, request), headers={"x-fledge-job": job.id})


@dataclass
class Chat:
    """One chat completion on its way."""

    state: State
    principal: Principal
    body: ChatRequest
    toolbox: Toolbox
    notes: dict[str, str]
    id: str = field(default_factory=lambda: new_id("chatcmpl-"))
    created_at: int = field(default_factory=now)

    async def run(self, job: Job) -> dict[str, Any]:
        """Answer, and give back the completion; its chunks, or itself, are the job's events."""
        body = self.body
        async with self.state.hub.use(self.principal.owner, body.model) as model:
            choices = [ChatChoice(i, model, self.toolbox, bool(body.logprobs)) for i in range(body.n or 1)]
            with Generation(self.state, self.principal, model, body.model, self.notes) as generation:
                asked, texts = await self._ask(generation, model)
                guarding = Guarding(self.state, texts, body.moderation, bool(body.stream))
                await self._answer(job, generation, asked, choices, guarding)
        completion = {
            **self._head(model, "chat.completion"),
            "choices": [choice.body for choice in choices],
            "usage": generation.usage.to_chat(),
        }
        if (report := guarding.report("chat")) is not None:
            completion["moderation"] = report
        if body.store:
            completion["metadata"] = body.metadata or {}
            await self._store(completion)
        if not body.stream and job.is_kept:
            job.emit(encode(completion))
        return completion

    async def _ask(self, generation: Generation, model: ServedModel) -> tuple[EngineRequest, list[str]]:
        """What the engine is asked, and what the user wrote."""
        body = self.body
        conversation = to_conversation(body.messages, self.toolbox)
        grammar = to_grammar(self.toolbox, body.response_format, model.style)
        # Rendering and encoding a long conversation takes a while; other requests go on meanwhile.
        prompt = await asyncio.to_thread(model.renderer.prompt, conversation)
        told = (body.top_logprobs or 0) if body.logprobs else None
        shape = Shape(self._max_tokens, body.n or 1, top_logprobs=told, grammar=grammar)
        asked = generation.plan(body, prompt, shape)
        generation.charge([asked])
        return asked, written(conversation)

    @property
    def _max_tokens(self) -> int | None:
        body = self.body
        return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens

    async def _answer(
        self,
        job: Job,
        generation: Generation,
        asked: EngineRequest,
        choices: list[ChatChoice],
        guarding: Guarding,
    ) -> None:
        options = self.body.stream_options
        wants_usage = bool(options and options.include_usage)
        is_padded = options is None or options.include_obfuscation is not False
        counted = generation.usage if options is not None and options.is_counted_throughout else None
        chunks = Chunks(self._head(generation.model, "chat.completion.chunk"), wants_usage, is_padded, counted)
        async for event in guarding.events(generation, asked, is_empty=self._max_tokens == 0):
            self._take(job, chunks, choices[event.index], event)
        report = guarding.report("chat")
        if self.body.stream and report is not None:
            job.emit(encode(chunks.moderation(report)))
        if self.body.stream and wants_usage:
            job.emit(encode(chunks.usage(generation.usage)))

    def _take(self, job: Job, chunks: Chunks, choice: ChatChoice, event: TokenEvent) -> None:
        deltas = choice.take(event)
        if not self.body.stream:
            for _ in deltas:
                pass
            return
        for delta, told in deltas:
            job.emit(encode(chunks.delta(choice.index, delta, told)))
        if choice.finish_reason is not None:
            job.emit(encode(chunks.finish(choice)))

    def _head(self, model: ServedModel, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created_at,
            "model": self.body.model,
            "service_tier": "default",
            "system_fingerprint": f"fp_{model.fingerprint[:12]}",
        }

    async def _store(self, completion: dict[str, Any]) -> None:
        messages = [
            {"id": f"{self.id}-{i}", **message.model_dump(exclude_none=True)}
            for i, message in enumerate(self.body.messages)
        ]
        row = CompletionRow(
            id=self.id,
            created_at=self.created_at,
            owner=self.principal.owner,
            model=self.body.model,
            labels=self.body.metadata or {},
            messages=messages,
            body=completion,
        )
        await add_completion(self.state.database, row)
