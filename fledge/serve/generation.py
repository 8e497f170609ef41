"""From a request to the engine's events: bounds, budgets, counting. All that generates comes through here.

`plan` turns what the endpoints share (`Sampling`) into the engine's `Request`; `events` runs one and counts.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Self

from fledge.serve.auth import Principal
from fledge.serve.chat_wire import Sampling
from fledge.serve.engine import ServedModel
from fledge.serve.errors import ApiError, refused
from fledge.serve.state import State
from fledge.serve.usage import Usage
from fledge.types import Grammar, Request, SamplingParams, TokenEvent


@dataclass(frozen=True)
class Shape:
    """What one endpoint wants beside the sampling: how long, how many, what is told of each token, and whether an
    answer continues the prompt's text."""

    max_tokens: int | None
    n: int = 1
    best_of: int | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    continues: bool = False


@dataclass
class Generation:
    """Requests to one model's engine in the name of one principal, and what they cost together; for `with`."""

    state: State
    principal: Principal
    model: ServedModel
    name: str
    notes: dict[str, str] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    _charged: int = 0

    def plan(self, sampling: Sampling, prompt: Sequence[int], shape: Shape) -> Request:
        """The engine's request. 400 for a prompt that is too long or a number that cannot be used."""
        max_tokens = self._max_tokens(len(prompt), shape.max_tokens)
        stop = (sampling.stop,) if isinstance(sampling.stop, str) else tuple(sampling.stop or ())
        params = SamplingParams(
            max_tokens=max(1, max_tokens),
            temperature=1.0 if sampling.temperature is None else sampling.temperature,
            top_k=1 if sampling.top_p == 0 else sampling.top_k,
            top_p=sampling.top_p or None,
            min_p=sampling.min_p,
            seed=secrets.randbits(62) if sampling.seed is None else _within_reach(sampling.seed),
            presence_penalty=sampling.presence_penalty or 0.0,
            frequency_penalty=sampling.frequency_penalty or 0.0,
            repetition_penalty=sampling.repetition_penalty or 1.0,
            logit_bias=self._logit_bias(sampling.logit_bias or {}),
            min_tokens=max_tokens if sampling.ignore_eos else self._min_tokens(sampling.min_tokens or 0, max_tokens),
        )
        return Request(
            id=uuid.uuid4().hex,
            prompt_ids=tuple(prompt),
            params=params,
            stop_ids=self.model.renderer.stop_ids,
            stop=stop,
            tenant=self.principal.owner,
            adapter=self.model.adapter,
            n=shape.n,
            best_of=shape.best_of,
            top_logprobs=shape.top_logprobs,
            prompt_logprobs=shape.prompt_logprobs,
            grammar=shape.grammar,
            continues=shape.continues,
        )

    def charge(self, requests: Sequence[Request]) -> None:
        """Take what these may cost from the key's budget of tokens; 429 if it is not there."""
        num_answers = sum(request.best_of or request.n for request in requests)
        if num_answers > self.state.config.max_answers:
            most = self.state.config.max_answers
            raise refused(f"{num_answers} answers are asked for in one request, at most {most} are given", "n")
        cost = sum(len(r.prompt_ids) + r.params.max_tokens * (r.best_of or r.n) for r in requests)
        self.principal.budgets.charge("tokens", cost)
        self._charged += cost
        self.notes.update(self.principal.budgets.headers())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """All is over: give back what was charged and not used."""
        self.principal.budgets.give_back(self._charged - self.usage.prompt - self.usage.completion)
        self.notes.update(self.principal.budgets.headers())

    async def events(self, request: Request, *, is_empty: bool = False) -> AsyncGenerator[TokenEvent]:
        """What the engine says, counted. Leaving the iteration early ends the request.

        `is_empty`: no token is wanted, so the engine is not asked at all.
        """
        if is_empty:
            self.usage.prompt += len(request.prompt_ids)
            for index in range(request.n):
                yield TokenEvent(-1, 0.0, "", "length", request.id, index)
            return
        began, is_first = time.perf_counter(), True
        own = Usage(prompt=len(request.prompt_ids))
        self.usage.prompt += own.prompt
        try:
            async with aclosing(self.model.engine.submit(request)) as stream:
                async for event in stream:
                    self._count(own, event, began if is_first else None)
                    is_first = False
                    yield event
        finally:
            self.state.metrics.generation(self.model.label, own, time.perf_counter() - began)

    def _count(self, own: Usage, event: TokenEvent, began: float | None) -> None:
        """`began` is when the request was sent, given with its first event."""
        if began is not None:
            self.state.metrics.first_token(self.model.label, time.perf_counter() - began)
        for usage in (own, self.usage):
            usage.completion += event.id >= 0
            usage.cached += event.num_cached
        if event.finish_reason is not None:
            self.state.metrics.finished(self.model.label, event.finish_reason)
        if event.finish_reason == "error":
            raise ApiError(500, "The model's prediction is not a number; its weights are damaged")

    def _max_tokens(self, num_prompt: int, asked: int | None) -> int:
        context = self.model.context
        room = self.state.config.max_tokens if context is None else context - num_prompt
        needed = 1 if asked is None else asked
        if needed > room:
            message = (
                f"This model's maximum context length is {num_prompt + room} tokens. Your prompt has {num_prompt} "
                f"and you asked for {needed} more; shorten the prompt or ask for fewer"
            )
            raise refused(message, "messages", "context_length_exceeded")
        return min(room, self.state.config.max_tokens) if asked is None else asked

    def _logit_bias(self, given: dict[str, float]) -> tuple[tuple[int, float], ...]:
        """A bias of 0 asks for nothing."""
        biases = []
        for key, bias in given.items():
            if bias == 0:
                continue
            is_number = key.isascii() and key.isdigit() and len(key) <= 10
            if not (is_number and int(key) < self.model.tokenizer.vocab_size):
                message = f"'{key[:50]}' is no token id; ids go from 0 to {self.model.tokenizer.vocab_size - 1}"
                raise refused(message, "logit_bias", "invalid_value")
            biases.append((int(key), bias))
        return tuple(biases)

    def _min_tokens(self, asked: int, max_tokens: int) -> int:
        if asked > max_tokens:
            raise refused(f"min_tokens {asked} is more than the {max_tokens} that the answer may have", "min_tokens")
        return asked


def _within_reach(seed: int) -> int:
    """The engine draws answer i with seed + i, and that must be a number of 64 bits."""
    return seed if seed < 2**63 - 2**16 else seed - 2**16
