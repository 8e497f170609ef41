"""POST /v1/completions: texts continued, without any conversation around them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fledge.errors import TokenizerError
from fledge.serve.auth import Principal, needs
from fledge.serve.chat import Keep
from fledge.serve.completions_wire import COMPLETION_FIELDS, Completion, CompletionRequest, as_prompts
from fledge.serve.engine import ServedModel
from fledge.serve.errors import refused
from fledge.serve.generation import Generation, Shape
from fledge.serve.guarding import Guarding
from fledge.serve.jobs import Job
from fledge.serve.sse import awaited, encode, json_response, streamed
from fledge.serve.state import State, state_of
from fledge.serve.text_answer import Prompt, TextChoice
from fledge.serve.wire import obey
from fledge.store.pages import new_id, now
from fledge.types import Request as EngineRequest
from fledge.types import TokenEvent, TokenLogprobs

router = APIRouter(prefix="/v1/completions", tags=["completions"])


@router.post("", responses={200: {"model": Completion}})
async def create(
    request: Request,
    body: CompletionRequest,
    principal: Annotated[Principal, Depends(needs("generate"))],
    is_kept: Keep = False,
) -> Response:
    request.state.notes.update(obey(COMPLETION_FIELDS, body))
    n, best_of = body.n or 1, body.best_of or None
    if best_of is not None and best_of < n:
        raise refused(f"best_of {best_of} must be at least n {n}", "best_of", "invalid_value")
    if body.stream and best_of is not None and best_of > n:
        raise refused("the best answers are known at the end: no 'best_of' with 'stream'", "best_of", "invalid_value")
    task = TextTask(state_of(request), principal, body, request.state.notes)
    job = await task.state.jobs.start(principal.owner, "text_completion", task.run, is_kept=is_kept)
    if body.stream:
        return await streamed(job)
    return json_response(await awaited(job, request), headers={"x-fledge-job": job.id})


@dataclass
class TextTask:
    """One request on its way: several prompts, n answers to each."""

    state: State
    principal: Principal
    body: CompletionRequest
    notes: dict[str, str]
    id: str = field(default_factory=lambda: new_id("cmpl-"))
    created_at: int = field(default_factory=now)

    async def run(self, job: Job) -> dict[str, Any]:
        """Answer, and give back the completion; its chunks, or itself, are the job's events."""
        async with self.state.hub.use(self.principal.owner, self.body.model) as model:
            prompts = await asyncio.to_thread(self._prompts, model, as_prompts(self.body.prompt))
            with Generation(self.state, self.principal, model, self.body.model, self.notes) as generation:
                asked = [self._ask(generation, prompt.ids) for prompt in prompts]
                generation.charge(asked)
                choices = await self._answer(job, generation, asked, prompts)
                if self.body.max_tokens == 0:  # what had to be drawn to score the prompts is nobody's
                    generation.usage.completion = 0
        completion = {
            **self._head(model),
            "choices": [choice.body for choice in choices],
            "usage": generation.usage.to_chat(),
        }
        if self.body.stream and self.body.stream_options and self.body.stream_options.include_usage:
            job.emit(encode({**completion, "choices": []}))
        elif not self.body.stream and job.is_kept:
            job.emit(encode(completion))
        return completion

    def _prompts(self, model: ServedModel, given: Sequence[str | list[int]]) -> list[Prompt]:
        found = []
        for i, prompt in enumerate(given):
            if isinstance(prompt, str):
                ids, text = [model.tokenizer.end_of_text_id, *model.tokenizer.encode(prompt)], prompt
            else:
                ids, text = prompt, self._decode(model, prompt, i)
            is_framed = isinstance(prompt, str) or self.body.suffix is not None
            found.append(Prompt(self._filled(model, ids), text, is_framed))
        return found

    def _filled(self, model: ServedModel, ids: list[int]) -> list[int]:
        """With a suffix, the frame in which the model was taught to fill in (data/fim.py, order PSM)."""
        if self.body.suffix is None:
            return ids
        if model.fim_ids is None:
            raise refused("this model was not trained to fill in", "suffix", "unsupported_parameter")
        prefix, suffix, middle = model.fim_ids
        start = model.tokenizer.end_of_text_id
        head = ids[1:] if ids[0] == start else ids
        return [start, prefix, *head, suffix, *model.tokenizer.encode(self.body.suffix, within=True), middle]

    def _decode(self, model: ServedModel, ids: Sequence[int], i: int) -> str:
        try:
            return model.tokenizer.decode(ids)
        except TokenizerError as error:
            raise refused(str(error), f"prompt[{i}]", "invalid_value") from None

    def _ask(self, generation: Generation, ids: Sequence[int]) -> EngineRequest:
        body = self.body
        told = body.logprobs
        # More answers than are asked for are drawn only to find the best.
        best_of = body.best_of or None
        of_prompt = told if body.echo and told is not None else None
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        shape = Shape(max_tokens, body.n or 1, best_of, told, of_prompt, continues=True)
        return generation.plan(body, ids, shape)

    async def _answer(
        self, job: Job, generation: Generation, asked: Sequence[EngineRequest], prompts: Sequence[Prompt]
    ) -> list[TextChoice]:
        """Run all prompts side by side; their answers in order."""
        n = self.body.n or 1
        choices = [
            [TextChoice(i * n + k, generation.model, self.body.logprobs) for k in range(n)] for i in range(len(asked))
        ]
        async with asyncio.TaskGroup() as group:
            for request, own, prompt in zip(asked, choices, prompts, strict=True):
                group.create_task(self._continue(job, generation, request, own, prompt))
        return [choice for own in choices for choice in own]

    async def _continue(
        self, job: Job, generation: Generation, asked: EngineRequest, choices: Sequence[TextChoice], prompt: Prompt
    ) -> None:
        is_empty = self.body.max_tokens == 0 and asked.prompt_logprobs is None
        told: tuple[TokenLogprobs, ...] | None = None if asked.prompt_logprobs is not None else ()
        waiting: list[TokenEvent] = []  # events of other answers that came before the prompt's own were told
        guarding = Guarding(self.state, [prompt.text] if prompt.text.strip() else [], None, bool(self.body.stream))
        async for event in guarding.events(generation, asked, is_empty=is_empty):
            waiting.append(event)
            if told is None and (event.index == 0 or event.finish_reason == "content_filter"):
                told = event.prompt
            if told is not None:
                self._take(job, generation, choices, waiting, (prompt, told))
                waiting.clear()

    def _take(
        self,
        job: Job,
        generation: Generation,
        choices: Sequence[TextChoice],
        events: Sequence[TokenEvent],
        begun: tuple[Prompt, Sequence[TokenLogprobs]],
    ) -> None:
        prompt, told = begun
        for event in events:
            choice = choices[event.index]
            if not choice.has_begun:
                self._say(job, generation, choice, choice.begin(prompt if self.body.echo else None, told))
            piece = choice.end("length") if self.body.max_tokens == 0 else choice.take(event)
            self._say(job, generation, choice, piece)

    def _say(self, job: Job, generation: Generation, choice: TextChoice, piece: dict[str, Any] | None) -> None:
        if self.body.stream and piece is not None:
            chunk = {**self._head(generation.model), "choices": [{"index": choice.index, **piece}]}
            options = self.body.stream_options
            if options and options.include_usage:
                chunk["usage"] = generation.usage.to_chat() if options.is_counted_throughout else None
            job.emit(encode(chunk))

    def _head(self, model: ServedModel) -> dict[str, Any]:
        head = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created_at,
            "model": self.body.model,
        }
        return {**head, "system_fingerprint": f"fp_{model.fingerprint[:12]}"}
