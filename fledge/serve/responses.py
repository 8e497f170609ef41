"""POST /v1/responses: answers that know what came before them, in the background if wanted.

A response is a job of its own id, so that its events can be read again from any of them on; what is stored stands in
`store.responses` and can be built upon by `previous_response_id`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fledge.serve.auth import Principal, needs
from fledge.serve.chat import Keep
from fledge.serve.engine import ServedModel
from fledge.serve.errors import ApiError, api_error, refused
from fledge.serve.generation import Generation, Shape
from fledge.serve.guarding import Guarding, written
from fledge.serve.jobs import Job
from fledge.serve.responses_events import INCOMPLETE, Event, Writer
from fledge.serve.responses_input import (
    Item,
    Reader,
    conversation_id_of,
    grammar_of,
    items_before,
    own_items,
    to_conversation,
    toolbox_of,
)
from fledge.serve.responses_wire import (
    COUNT_FIELDS,
    LOGPROBS,
    RESPONSE_FIELDS,
    CountRequest,
    ResponseObject,
    ResponseRequest,
)
from fledge.serve.sse import awaited, encode, json_response, streamed
from fledge.serve.state import State, state_of
from fledge.serve.wire import obey
from fledge.store.conversations import add_items
from fledge.store.pages import new_id, now
from fledge.store.responses import PREFIX, add_response, delete_response, update_response
from fledge.store.tables import ResponseRow
from fledge.types import Request as EngineRequest
from fledge.types import TokenEvent

router = APIRouter(prefix="/v1/responses", tags=["responses"])

User = Annotated[Principal, Depends(needs("generate"))]


@router.post("", responses={200: {"model": ResponseObject}})
async def create(request: Request, body: ResponseRequest, principal: User, is_kept: Keep = False) -> Response:
    request.state.notes.update(obey(RESPONSE_FIELDS, body, body.inert_parts))
    if body.background and body.store is False:
        raise refused("a response in the background must be stored", "background", "invalid_value")
    state = state_of(request)
    inputs = await own_items(state.database, principal.owner, body)
    answer = Answering(state, principal, body, state.hub.name_for(body.model), inputs, request.state.notes)
    is_kept = is_kept or bool(body.background)
    if is_kept:
        await answer.store("queued" if body.background else "in_progress")
    try:
        job = await state.jobs.start(principal.owner, "response", answer.run, is_kept=is_kept, job_id=answer.id)
    except BaseException:
        await answer.drop()
        raise
    if body.stream:
        return await streamed(job, is_named=True)
    if body.background:
        job.leave()
        return json_response(answer.body("queued"))
    return json_response(await awaited(job, request))


@router.post("/input_tokens")
async def count_tokens(request: Request, body: CountRequest, principal: User) -> Response:
    """How many tokens the model would read."""
    request.state.notes.update(obey(COUNT_FIELDS, body, body.inert_parts))
    state = state_of(request)
    before = await items_before(state.database, principal.owner, body)
    own = await own_items(state.database, principal.owner, body)
    conversation = to_conversation(body.instructions, [*before, *own], toolbox_of(body))
    async with state.hub.use(principal.owner, state.hub.name_for(body.model)) as model:
        room = model.context if body.truncation == "auto" else None
        prompt = await Reader(model, room).prompt(conversation)
    return json_response({"object": "response.input_tokens", "input_tokens": len(prompt)})


@dataclass
class Answering:
    """One response on its way. `inputs` are its own items."""

    state: State
    principal: Principal
    request: ResponseRequest
    model_name: str
    inputs: list[Item]
    notes: dict[str, str]
    id: str = field(default_factory=lambda: new_id(PREFIX))
    created_at: int = field(default_factory=now)
    is_stored: bool = False
    writer: Writer | None = None
    usage: dict[str, Any] | None = None
    num_events: int = 0
    guarding: Guarding | None = None

    async def run(self, job: Job) -> dict[str, Any]:
        """Answer, store and give back the response. A failure after the first event is an event as well."""
        try:
            await self._answer(job)
        except BaseException as error:
            status = "failed" if isinstance(error, Exception) else "cancelled"
            body = self.body(status, error=api_error(error) if status == "failed" else None)
            if self.num_events:
                self._emit(job, {"type": f"response.{status}", "response": body}, is_logged=status == "failed")
            if self.is_stored:
                await update_response(self.state.database, self.principal.owner, self.id, body)
            raise
        assert self.writer is not None
        status = "incomplete" if self.writer.reason in INCOMPLETE else "completed"
        body = self.body(status)
        await self._keep(body)
        self._emit(job, {"type": f"response.{status}", "response": body})
        return body

    async def _answer(self, job: Job) -> None:
        request = self.request
        owner = self.principal.owner
        toolbox = toolbox_of(request)
        before = await items_before(self.state.database, owner, request)
        conversation = to_conversation(request.instructions, [*before, *self.inputs], toolbox)
        async with self.state.hub.use(owner, self.model_name) as model:
            options = request.stream_options
            is_padded = options is None or options.include_obfuscation is not False
            self.writer = Writer(self.id, model, toolbox, self._wants_logprobs, is_padded)
            prompt = await self._reader(model).prompt(conversation)
            told = (request.top_logprobs or 0) if self._wants_logprobs else None
            shape = Shape(request.max_output_tokens, top_logprobs=told, grammar=grammar_of(request, toolbox, model))
            if self.is_stored:
                await update_response(self.state.database, owner, self.id, self.body("in_progress"))
            with Generation(self.state, self.principal, model, self.model_name, self.notes) as generation:
                self.guarding = Guarding(self.state, written(conversation), request.moderation, bool(request.stream))
                await self._generate(job, generation, generation.plan(request.sampling(self.model_name), prompt, shape))

    async def _generate(self, job: Job, generation: Generation, asked: EngineRequest) -> None:
        assert self.guarding is not None
        generation.charge([asked])
        try:
            async for event in self.guarding.events(generation, asked, is_empty=self.request.max_output_tokens == 0):
                self._take(job, event)
        finally:
            self.usage = generation.usage.to_response()

    def _take(self, job: Job, event: TokenEvent) -> None:
        assert self.writer is not None
        if not self.num_events:
            for kind in ("response.created", "response.in_progress"):
                self._emit(job, {"type": kind, "response": self.body("in_progress")})
        for told in self.writer.take(event):
            self._emit(job, told)

    def _emit(self, job: Job, event: Event, *, is_logged: bool = True) -> None:
        if is_logged and (self.request.stream or job.is_kept):
            job.emit(encode({**event, "sequence_number": self.num_events}))
        self.num_events += 1

    def _reader(self, model: ServedModel) -> Reader:
        if self.request.truncation != "auto" or model.context is None:
            return Reader(model, None)
        wanted = self.request.max_output_tokens
        return Reader(model, max(1, model.context - (1 if wanted is None else wanted)))

    @property
    def _wants_logprobs(self) -> bool:
        return LOGPROBS in (self.request.include or ())

    def body(self, status: str, error: ApiError | None = None) -> dict[str, Any]:
        """The response as it stands."""
        request = self.request
        told = None if error is None else {"code": error.code or "server_error", "message": error.message}
        settled = status not in ("queued", "in_progress")
        is_cut = status == "incomplete"
        report = self.guarding.report("response") if settled and self.guarding is not None else None
        shown = {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": now() if status == "completed" else None,
            "status": status,
            "background": bool(request.background),
            "error": told,
            "incomplete_details": {"reason": INCOMPLETE[str(self.writer.reason)]} if is_cut and self.writer else None,
            "model": self.model_name,
            "output": self.writer.output if self.writer is not None and settled else [],
            "usage": self.usage if settled else None,
            **_echoed(request),
        }
        return shown if report is None else {**shown, "moderation": report}

    async def store(self, status: str) -> None:
        row = ResponseRow(
            id=self.id,
            created_at=self.created_at,
            owner=self.principal.owner,
            status=status,
            previous_id=self.request.previous_response_id,
            is_background=bool(self.request.background),
            inputs=self.inputs,
            body=self.body(status),
        )
        await add_response(self.state.database, row)
        self.is_stored = True

    async def drop(self) -> None:
        """It could not even be begun."""
        if self.is_stored:
            await delete_response(self.state.database, self.principal.owner, self.id)

    async def _keep(self, body: dict[str, Any]) -> None:
        if self.is_stored:
            await update_response(self.state.database, self.principal.owner, self.id, body)
        elif self.request.store is not False:
            await self.store(body["status"])
            await update_response(self.state.database, self.principal.owner, self.id, body)
        conversation_id = conversation_id_of(self.request)
        if conversation_id is not None:
            await add_items(self.state.database, conversation_id, [*self.inputs, *body["output"]])


def _echoed(request: ResponseRequest) -> Event:
    """The settings of the request, as a response repeats them."""
    form = request.text.format if request.text else None
    conversation_id = conversation_id_of(request)
    shown = {"type": "text"} if form is None else form.model_dump(exclude_none=True, by_alias=True)
    return {
        "conversation": None if conversation_id is None else {"id": conversation_id},
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": shown},
        "tool_choice": request.tool_choice or "auto",
        "tools": list(_echoed_tools(request)),
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
        **({} if request.user is None else {"user": request.user}),  # published as a text, never null
    }


def _echoed_tools(request: ResponseRequest) -> Iterator[dict[str, Any]]:
    for tool in request.tools or ():
        shown = {"type": tool.type, "name": tool.name, "description": tool.description}
        yield {**shown, "parameters": tool.parameters, "strict": bool(tool.strict)}
