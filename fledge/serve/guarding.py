"""Moderation in-line: what a user wrote is judged before it is answered, and an answer before it leaves.

Works on the engine's events, so that chat, responses and plain completions, streamed or whole, are guarded alike. What
blocks ends an answer with the finish reason `content_filter` and a refusal that says why (safety/guard.py).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from fledge.errors import EngineError
from fledge.safety.categories import NAMES
from fledge.safety.classifier import Verdict
from fledge.safety.guard import GuardConfig, Mode, Side, stricter
from fledge.serve.chat_wire import ModerationWish
from fledge.serve.errors import refused
from fledge.serve.generation import Generation
from fledge.serve.moderation import COMMAND, Moderator
from fledge.serve.moderations import require_moderator, show_verdict
from fledge.serve.state import State
from fledge.types import Conversation, Request, TokenEvent

Kind = Literal["chat", "response"]
_NOTHING = Verdict(dict.fromkeys(NAMES, 0.0), ())


def written(conversation: Conversation) -> list[str]:
    """What came from outside: users' messages and the results of tools."""
    texts = [message.text for message in conversation.messages if message.role in ("user", "tool")]
    return [text for text in texts if text.strip()]


@dataclass
class Guarding:
    """One request's moderation. `texts` are what the user wrote."""

    state: State
    texts: Sequence[str]
    wish: ModerationWish | None
    is_streamed: bool
    inputs: list[Verdict] = field(default_factory=list)
    outputs: dict[int, Verdict] = field(default_factory=dict)
    error: str | None = None

    def __post_init__(self) -> None:
        if self.wish is None:
            return
        if self.state.moderator is None:
            message = f"'moderation' needs a moderation model; the operator makes one with `{COMMAND}`"
            raise refused(message, "moderation", "unsupported_parameter")
        require_moderator(self.state.moderator, self.wish.model, "moderation.model")

    def mode(self, side: Side) -> Mode:
        """The stricter of what the server does and what the request wants; asking for it at all asks for scores."""
        if self.state.moderator is None:
            return "off"
        own: Mode = getattr(self._config, side)
        if self.wish is None:
            return own
        wanted = getattr(self.wish.policy, side, None)
        return stricter(own, "score" if wanted is None else wanted.mode)

    async def events(
        self, generation: Generation, asked: Request, *, is_empty: bool = False
    ) -> AsyncGenerator[TokenEvent]:
        """The engine's events, or what is said in their place."""
        refusal = await self._refused_input()
        if refusal is not None:
            generation.usage.prompt += len(asked.prompt_ids)
            for index in range(asked.n):
                yield _blocked(asked, index, refusal)
            return
        source = generation.events(asked, is_empty=is_empty)
        if self.mode("output") == "off" or is_empty:
            guarded = source
        else:
            guarded = self._checked(source, asked)
        async with aclosing(source), aclosing(guarded):
            async for event in guarded:
                yield event

    def report(self, kind: Kind) -> dict[str, Any] | None:
        """The published `moderation` of the answer, if the request asked for it."""
        if self.wish is None:
            return None
        outputs = [self.outputs[index] for index in sorted(self.outputs)]
        return {"input": self._shown(self.inputs, kind), "output": self._shown(outputs, kind)}

    async def _refused_input(self) -> str | None:
        mode = self.mode("input")
        if mode == "off" or not self.texts:
            return None
        self.inputs = await self._judge(list(self.texts), mode)
        flagged = next((verdict for verdict in self.inputs if verdict.is_flagged), None)
        return self._refusal(flagged, "input") if flagged is not None and mode == "block" else None

    async def _checked(self, source: AsyncGenerator[TokenEvent], asked: Request) -> AsyncGenerator[TokenEvent]:
        answers = [_Answer(self._hold) for _ in range(asked.n)]
        mode = self.mode("output")
        async for event in source:
            answer = answers[event.index]
            if answer.is_over:
                continue
            is_due = answer.take(event)
            if not is_due and mode == "score":  # nothing is held back for a score
                yield answer.held.pop()
            if not is_due:
                continue
            [verdict] = await self._judge([answer.unchecked(self._config.context_chars)], mode)
            self._remember(event.index, verdict)
            if verdict.is_flagged and mode == "block":
                answer.is_over = True
                yield _blocked(asked, event.index, self._refusal(verdict, "output"))
                if all(one.is_over for one in answers):
                    return  # nobody waits for what the engine would still say
            else:
                for held in answer.release():
                    yield held

    @property
    def _config(self) -> GuardConfig:
        return self.state.config.guard

    @property
    def _hold(self) -> int | None:
        """How many characters are held back; None: all, because nothing leaves before the end anyway."""
        return self._config.hold_chars if self.is_streamed and self.mode("output") == "block" else None

    async def _judge(self, texts: list[str], mode: Mode) -> list[Verdict]:
        """Where it is to block, what cannot be judged is an error; where it only scores, the answer says so."""
        moderator = self.state.moderator
        assert moderator is not None
        try:
            return await moderator.judge(texts)
        except EngineError as error:
            if mode == "block":
                raise
            self.error = str(error)
            return [Verdict({}, ()) for _ in texts]

    def _remember(self, index: int, verdict: Verdict) -> None:
        """The worst of an answer's windows, by category."""
        before = self.outputs.get(index)
        if before is None:
            self.outputs[index] = verdict
            return
        scores = {name: max(score, before.scores.get(name, 0.0)) for name, score in verdict.scores.items()}
        flagged = tuple(name for name in scores if name in (*before.flagged, *verdict.flagged))
        self.outputs[index] = Verdict(scores, flagged)

    def _refusal(self, verdict: Verdict, side: Side) -> str:
        moderator: Moderator | None = self.state.moderator
        assert moderator is not None
        self.state.metrics.blocked(side)
        asked = self.texts[-1] if self.texts else ""
        return self.state.guard.refusal(verdict, side, moderator.thresholds, asked)

    def _shown(self, verdicts: Sequence[Verdict], kind: Kind) -> dict[str, Any]:
        moderator = self.state.moderator
        assert moderator is not None
        if self.error is not None:
            return {"type": "error", "code": "moderation_unavailable", "message": "The moderation model did not answer"}
        bodies = [{"type": "moderation_result", "model": moderator.name, **show_verdict(one)} for one in verdicts]
        if kind == "chat":
            return {"type": "moderation_results", "model": moderator.name, "results": bodies}
        nothing = {"type": "moderation_result", "model": moderator.name, **show_verdict(_NOTHING)}
        return max(bodies, key=lambda body: (body["flagged"], max(body["category_scores"].values())), default=nothing)


@dataclass
class _Answer:
    """One answer while it is checked. `hold` characters wait at a time; None: all until its end."""

    hold: int | None
    said: str = ""
    num_released: int = 0
    held: list[TokenEvent] = field(default_factory=list)
    is_over: bool = False

    def take(self, event: TokenEvent) -> bool:
        """Whether it is time to check."""
        self.held.append(event)
        self.said += event.text
        if event.finish_reason is not None:
            return True
        return self.hold is not None and len(self.said) - self.num_released >= self.hold

    def unchecked(self, num_before: int) -> str:
        """What is to leave next, with so many characters of what has left."""
        return self.said[max(0, self.num_released - num_before) :]

    def release(self) -> list[TokenEvent]:
        held, self.held = self.held, []
        self.num_released = len(self.said)
        self.is_over = held[-1].finish_reason is not None
        return held


def _blocked(asked: Request, index: int, refusal: str) -> TokenEvent:
    return TokenEvent(-1, 0.0, refusal, "content_filter", asked.id, index)
