"""What makes data asks of a model: to go on with a text, and how likely it finds a continuation.

Everything in synth/ is written against these two protocols; `EngineModel` is the engine behind them, tests hand in
scripts. Texts go in and out, so that a base model continues them and a chat model is asked them: which of the two is
the adapter's affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fledge.errors import DataError
from fledge.infer.engine import Engine
from fledge.text.chat import Renderer
from fledge.text.tokenizer import Tokenizer
from fledge.types import Completion, Conversation, Request, SamplingParams

Progress = Callable[[str, int, int], None]
"""(phase, done, of how many)"""


def unwatched(phase: str, done: int, total: int) -> None:
    """A `Progress` that nobody watches."""


@dataclass(frozen=True)
class Ask:
    """A text to go on with. Its own seed stands in `params`, so an answer does not depend on what else is asked.

    `conversation` is what `prompt` writes out, where it is one: a chat model answers it in its own template.
    """

    prompt: str
    params: SamplingParams
    stop: tuple[str, ...] = ()
    conversation: Conversation | None = None


class Generator(Protocol):
    def generate(self, asks: Sequence[Ask]) -> list[Completion]:
        """One completion an ask, in order; a stop string is not part of its text."""
        ...


class Scorer(Protocol):
    def score(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]]) -> list[list[float]]:
        """ln P(continuation | prompt), summed over its tokens: for each prompt, for each of its continuations."""
        ...


class Model(Generator, Scorer, Protocol):
    """Both."""


class EngineModel:
    """The engine as a `Model`. With a renderer a prompt is a user's message and the model answers it as the assistant;
    without one the model continues the text."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, renderer: Renderer | None = None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._count = 0

    def generate(self, asks: Sequence[Ask]) -> list[Completion]:
        requests = [self._request(ask) for ask in asks]
        return [answers[0] for answers in self._engine.generate(requests)]

    def score(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]]) -> list[list[float]]:
        starts = [self._ids(prompt) for prompt in prompts]
        encode = self._tokenizer.encode
        within = self._renderer is None
        rows = [
            (start, encode(text, within=within))
            for start, texts in zip(starts, continuations, strict=True)
            for text in texts
        ]
        if not all(ids for _, ids in rows):
            raise DataError("a continuation to be scored has no tokens; give it at least one letter")
        # The engine says the log-probability of every token but the first; the last ones are the continuation's.
        scored = self._engine.score([(*start, *ids) for start, ids in rows])
        sums = iter(math.fsum(logprobs[-len(ids) :]) for logprobs, (_, ids) in zip(scored, rows, strict=True))
        return [[next(sums) for _ in texts] for texts in continuations]

    def num_tokens(self, ask: Ask, answers: Sequence[str] = ()) -> int:
        """How long what is asked is, with these answers beside it."""
        return len(self._asked(ask)) + sum(len(self._tokenizer.encode(text)) for text in answers)

    def _request(self, ask: Ask) -> Request:
        self._count += 1
        stop_ids = {self._tokenizer.end_of_text_id} | (self._renderer.stop_ids if self._renderer else set())
        return Request(
            f"synth-{self._count}",
            self._asked(ask),
            ask.params,
            stop_ids=frozenset(stop_ids),
            stop=ask.stop,
            continues=self._renderer is None,
        )

    def _asked(self, ask: Ask) -> tuple[int, ...]:
        if self._renderer is not None and ask.conversation is not None:
            return self._renderer.prompt(ask.conversation)
        return self._ids(ask.prompt)

    def _ids(self, prompt: str) -> tuple[int, ...]:
        if self._renderer is not None:
            return self._renderer.prompt(Conversation.of(("user", prompt)))
        return (self._tokenizer.end_of_text_id, *self._tokenizer.encode(prompt))
