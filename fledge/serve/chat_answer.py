"""The engine's events become the answer of a chat completion: deltas while it comes, messages in the end.

Source: openapi 2.3.0, `CreateChatCompletionResponse` and `CreateChatCompletionStreamResponse`.
"""

from __future__ import annotations

import random
import secrets
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fledge.serve.chat_messages import Toolbox
from fledge.serve.engine import ServedModel
from fledge.serve.usage import Usage
from fledge.text.tools import CallDelta, CallReader
from fledge.types import TokenEvent, TokenLogprobs

Delta = dict[str, Any]
# Deltas are padded to a multiple of this, so that their sizes on the wire do not give the words away.
_PAD_SIZE = 32
_PADDING = "".join(random.Random(0).choices(string.ascii_letters + string.digits, k=4096))


def token_text(model: ServedModel, token_id: int) -> tuple[str, list[int]]:
    """A token as text, perhaps with U+FFFD, and its bytes; a special one goes by its name."""
    if token_id in model.tokenizer.special_ids:
        name = model.tokenizer.pieces([token_id])[0]
        return name, list(name.encode())
    data = model.tokenizer.token_bytes(token_id)
    return data.decode(errors="replace"), list(data)


def logprob_entry(model: ServedModel, token_id: int, told: TokenLogprobs) -> dict[str, Any]:
    """A token as `logprobs.content` lists it."""
    text, data = token_text(model, token_id)
    top = []
    for other, logprob in told.top:
        other_text, other_data = token_text(model, other)
        top.append({"token": other_text, "logprob": finite(logprob), "bytes": other_data})
    return {"token": text, "logprob": finite(told.logprob), "bytes": data, "top_logprobs": top}


def finite(logprob: float) -> float:
    """JSON has no infinity; the published API says -9999.0 for what is impossible."""
    return max(logprob, -9999.0)


@dataclass
class ChatChoice:
    """One of the n answers, as far as it has come."""

    index: int
    model: ServedModel
    toolbox: Toolbox
    wants_logprobs: bool
    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    has_begun: bool = False
    refusal: str | None = None
    _reader: CallReader | None = None

    def __post_init__(self) -> None:
        if self.toolbox.names:
            self._reader = CallReader(self.model.style, self.toolbox.names, lambda _: "call_" + secrets.token_hex(12))

    def take(self, event: TokenEvent) -> Iterator[tuple[Delta, list[dict[str, Any]] | None]]:
        """The deltas of this event, each with the log-probabilities that go with it."""
        if not self.has_begun:
            self.has_begun = True
            yield {"role": "assistant", "content": "", "refusal": None}, None
        if event.finish_reason == "content_filter":
            self.refusal = event.text
            self.finish(event.finish_reason)
            yield {"refusal": event.text}, None
            return
        told = self._told(event)
        for delta in self._deltas(event):
            yield delta, told
            told = None
        if told:
            yield {"content": ""}, told
        if event.finish_reason is not None:
            self.finish(event.finish_reason)

    def finish(self, reason: str) -> None:
        if reason == "stop" and self.calls:
            reason = "function_call" if self.toolbox.is_deprecated else "tool_calls"
        self.finish_reason = "stop" if reason == "cancelled" else reason

    @property
    def message(self) -> dict[str, Any]:
        is_silent = bool(self.calls) or self.refusal is not None
        content = self.text if self.text or not is_silent else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": self.refusal}
        if self.calls and self.toolbox.is_deprecated:
            message["function_call"] = self.calls[0]["function"]
        elif self.calls:
            message["tool_calls"] = self.calls
        return message

    @property
    def body(self) -> dict[str, Any]:
        told = {"content": self.logprobs, "refusal": None} if self.wants_logprobs else None
        choice = {"index": self.index, "message": self.message, "logprobs": told}
        return {**choice, "finish_reason": self.finish_reason}

    def _told(self, event: TokenEvent) -> list[dict[str, Any]] | None:
        """What is said of the token; nothing of one that only ends the answer."""
        if not self.wants_logprobs or event.model is None or event.id in self.model.renderer.stop_ids:
            return None
        entry = logprob_entry(self.model, event.id, event.model)
        self.logprobs.append(entry)
        return [entry]

    def _deltas(self, event: TokenEvent) -> Iterator[Delta]:
        if self._reader is None:
            self.text += event.text
            if event.text:
                yield {"content": event.text}
            return
        pieces = self._reader.push(event.text)
        if event.finish_reason is not None:
            pieces += self._reader.finish()
        for piece in pieces:
            if isinstance(piece, str):
                self.text += piece
                yield {"content": piece}
            else:
                yield self._call_delta(piece)

    def _call_delta(self, piece: CallDelta) -> Delta:
        if piece.name is not None:
            function = {"name": piece.name, "arguments": piece.arguments}
            self.calls.append({"id": piece.id, "type": "function", "function": function})
            shown: dict[str, Any] = {
                "index": piece.index,
                "id": piece.id,
                "type": "function",
                "function": dict(function),
            }
        else:
            self.calls[piece.index]["function"]["arguments"] += piece.arguments
            shown = {"index": piece.index, "function": {"arguments": piece.arguments}}
        return {"function_call": shown["function"]} if self.toolbox.is_deprecated else {"tool_calls": [shown]}


@dataclass(frozen=True)
class Chunks:
    """Spells the events of a stream. `head` is what they all have in common, `counted` what is counted meanwhile and
    told in each."""

    head: dict[str, Any]
    has_usage: bool
    is_padded: bool
    counted: Usage | None = None

    def delta(self, index: int, delta: Delta, told: list[dict[str, Any]] | None) -> dict[str, Any]:
        logprobs = {"content": told, "refusal": None} if told else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self._chunk([choice], padding(delta) if self.is_padded else None)

    def finish(self, choice: ChatChoice) -> dict[str, Any]:
        end = {"index": choice.index, "delta": {}, "logprobs": None, "finish_reason": choice.finish_reason}
        return self._chunk([end], None)

    def moderation(self, report: dict[str, Any]) -> dict[str, Any]:
        return {**self._chunk([], None), "moderation": report}

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self.head, "choices": [], "usage": usage.to_chat()}

    def _chunk(self, choices: list[dict[str, Any]], pad: str | None) -> dict[str, Any]:
        chunk = {**self.head, "choices": choices}
        if self.has_usage:
            chunk["usage"] = None if self.counted is None else self.counted.to_chat()
        if pad is not None:
            chunk["obfuscation"] = pad
        return chunk


def padding(delta: Delta) -> str:
    """Fills up what the delta says to the next multiple of `_PAD_SIZE` characters."""
    said = delta.get("content") or str(delta.get("tool_calls") or delta.get("function_call") or "")
    length = -len(said.encode()) % _PAD_SIZE
    start = random.randrange(len(_PADDING) - _PAD_SIZE)
    return _PADDING[start : start + length]
