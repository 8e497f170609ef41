"""The engine's events become a choice of /v1/completions: texts with, if asked for, log-probabilities beside them.

Source: openapi 2.3.0, `CreateCompletionResponse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fledge.serve.chat_answer import finite, token_text
from fledge.serve.engine import ServedModel
from fledge.types import TokenEvent, TokenLogprobs


@dataclass
class _Told:
    """The four lists, one entry a token. The first token of a text follows on nothing and has no log-probability."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        lists = {"tokens": self.tokens, "token_logprobs": self.token_logprobs}
        return {**lists, "top_logprobs": self.top_logprobs, "text_offset": self.text_offset}

    def extend(self, other: _Told) -> None:
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset


@dataclass(frozen=True)
class Prompt:
    """What the model reads, and the text that `echo` shows of it. `is_framed`: special tokens among the ids are the
    server's own, and nothing is told of them."""

    ids: Sequence[int]
    text: str
    is_framed: bool


@dataclass
class TextChoice:
    """One answer, as far as it has come. `num_top` alternatives are told of each token; None tells nothing."""

    index: int
    model: ServedModel
    num_top: int | None
    text: str = ""
    finish_reason: str | None = None
    has_begun: bool = False
    _told: _Told = field(default_factory=_Told)

    def begin(self, prompt: Prompt | None, told: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """The prompt, where it is to be shown. `told` has one entry less than it has ids, or none at all if the engine
        was not asked. Of tokens that a client sent each is told, so that it finds its own by counting; of a text's
        frame (its beginning, for one) nothing is."""
        self.has_begun = True
        is_told = self.num_top is not None and prompt is not None and len(told) == len(prompt.ids) - 1
        if prompt is None or not (prompt.text or is_told):
            return None
        new, offset = _Told(), -self._num_unsaid(prompt.ids)
        for place, token_id in enumerate(prompt.ids if is_told else ()):
            is_special = token_id in self.model.tokenizer.special_ids
            if is_special and prompt.is_framed:
                continue
            self._tell(new, token_id, max(0, offset), told[place - 1] if place > 0 else None)
            offset += 0 if is_special else len(new.tokens[-1])
        return self._piece(prompt.text, new)

    def _num_unsaid(self, ids: Sequence[int]) -> int:
        """1 if the first token begins with a space that the tokenizer put before the text, else 0."""
        tokenizer = self.model.tokenizer
        first = next((i for i in ids if i not in tokenizer.special_ids), None)
        if first is None or not tokenizer.token_bytes(first).startswith(b" "):
            return 0
        return int(not tokenizer.decode([first]).startswith(" "))

    def take(self, event: TokenEvent) -> dict[str, Any] | None:
        """What the event adds; None if that is nothing."""
        new = _Told()
        if event.finish_reason == "content_filter":
            return self.end(event.finish_reason)
        if event.id >= 0 and event.model is not None:
            self._tell(new, event.id, len(self.text), event.model)  # of the one that ends the answer, too
        if event.finish_reason is not None:
            self.finish_reason = "stop" if event.finish_reason == "cancelled" else event.finish_reason
        if not event.text and not new.tokens and self.finish_reason is None:
            return None
        return self._piece(event.text, new)

    def end(self, reason: str) -> dict[str, Any]:
        self.finish_reason = reason
        return self._piece("", _Told())

    @property
    def body(self) -> dict[str, Any]:
        told = None if self.num_top is None else self._told.to_json()
        return {"index": self.index, "text": self.text, "logprobs": told, "finish_reason": self.finish_reason}

    def _tell(self, told: _Told, token_id: int, offset: int, own: TokenLogprobs | None) -> None:
        """The token itself is always among its alternatives, as published; of two that read alike the likelier is."""
        text, _ = token_text(self.model, token_id)
        told.tokens.append(text)
        told.text_offset.append(offset)
        told.token_logprobs.append(None if own is None else finite(own.logprob))
        top: dict[str, float] = {}
        for other, logprob in (*own.top, (token_id, own.logprob)) if own is not None else ():
            top.setdefault(token_text(self.model, other)[0], finite(logprob))
        told.top_logprobs.append(None if own is None else top)

    def _piece(self, text: str, new: _Told) -> dict[str, Any]:
        self.text += text
        self._told.extend(new)
        told = None if self.num_top is None else new.to_json()
        return {"text": text, "logprobs": told, "finish_reason": self.finish_reason}
