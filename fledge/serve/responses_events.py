"""The events of a response as it is written, and the output that they add up to.

Source: openapi 2.3.0, the `Response...Event` schemas. Every event has its `type` first and a `sequence_number`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fledge.serve.chat_answer import logprob_entry, padding
from fledge.serve.chat_messages import Toolbox
from fledge.serve.engine import ServedModel
from fledge.serve.sse import encode
from fledge.store.pages import new_id
from fledge.store.responses import name_item
from fledge.text.tools import CallDelta, CallReader
from fledge.types import TokenEvent

Event = dict[str, Any]

_PADDED = ("response.output_text.delta", "response.function_call_arguments.delta")
# Why an answer is cut short, by the engine's reason: what `incomplete_details` says.
INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


@dataclass
class Writer:
    """Writes the output items of one response. Each method yields the events that tell of what it did."""

    response_id: str
    model: ServedModel
    toolbox: Toolbox
    wants_logprobs: bool
    is_padded: bool
    output: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    _reader: CallReader | None = None
    _is_open: bool = False  # the last item of the output is being written

    def __post_init__(self) -> None:
        if self.toolbox.names:
            self._reader = CallReader(self.model.style, self.toolbox.names, lambda _: new_id("call_"))

    def take(self, event: TokenEvent) -> Iterator[Event]:
        if event.finish_reason == "content_filter":
            self.reason = event.finish_reason
            yield from self._refuse(event.text)
            return
        told = []
        if self.wants_logprobs and event.model is not None and event.id not in self.model.renderer.stop_ids:
            told = [logprob_entry(self.model, event.id, event.model)]
        pieces: list[str | CallDelta] = [event.text] if event.text or told else []
        if self._reader is not None:
            pieces = self._reader.push(event.text)
            if event.finish_reason is not None:
                pieces += self._reader.finish()
        for piece in pieces:
            yield from self._say(piece, told) if isinstance(piece, str) else self._call(piece)
            told = []
        if event.finish_reason is not None:
            self.reason = event.finish_reason
            yield from self.finish()

    def finish(self) -> Iterator[Event]:
        """Close what is open. An answer without a word is an empty message."""
        if not self.output:
            yield from self._open_message()
        yield from self._close()

    # Messages

    def _say(self, text: str, told: list[dict[str, Any]]) -> Iterator[Event]:
        if not (self._is_open and self._last["type"] == "message"):
            yield from self._close()
            yield from self._open_message()
        part = self._last["content"][0]
        part["text"] += text
        part["logprobs"] += told
        delta = {
            **self._place("response.output_text.delta"),
            "content_index": 0,
            "delta": text,
            "logprobs": told,
        }
        if self.is_padded:
            delta["obfuscation"] = padding({"content": text})
        yield delta

    def _open_message(self, part: Event | None = None) -> Iterator[Event]:
        item = {
            "id": self._new_name("msg_"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        yield from self._open(item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []} if part is None else part
        self._last["content"].append(part)
        yield {**self._place("response.content_part.added"), "content_index": 0, "part": _copied(part)}

    def _refuse(self, text: str) -> Iterator[Event]:
        """End with a message of its own that says why."""
        yield from self._close()
        part = {"type": "refusal", "refusal": ""}
        yield from self._open_message(part)
        part["refusal"] = text
        yield {**self._place("response.refusal.delta"), "content_index": 0, "delta": text}
        yield from self._close()

    # Calls

    def _call(self, piece: CallDelta) -> Iterator[Event]:
        if piece.name is not None:
            yield from self._close()
            call = {"call_id": piece.id, "name": piece.name, "arguments": ""}
            yield from self._open(
                {"id": self._new_name("fc_"), "type": "function_call", "status": "in_progress", **call}
            )
        if piece.arguments:
            self._last["arguments"] += piece.arguments
            delta = {**self._place("response.function_call_arguments.delta"), "delta": piece.arguments}
            if self.is_padded:
                delta["obfuscation"] = padding({"content": piece.arguments})
            yield delta

    # Items

    def _new_name(self, prefix: str) -> str:
        return name_item(self.response_id, prefix, len(self.output))

    @property
    def _last(self) -> dict[str, Any]:
        return self.output[-1]

    def _place(self, kind: str) -> Event:
        return {"type": kind, "item_id": self._last["id"], "output_index": len(self.output) - 1}

    def _open(self, item: dict[str, Any]) -> Iterator[Event]:
        self.output.append(item)
        self._is_open = True
        yield _item_event("response.output_item.added", len(self.output) - 1, item)

    def _close(self) -> Iterator[Event]:
        if not self._is_open:
            return
        self._is_open = False
        last = self._last
        last["status"] = "incomplete" if self.reason in INCOMPLETE else "completed"
        yield from _closing_events(last, len(self.output) - 1)


def _closing_events(item: dict[str, Any], index: int) -> Iterator[Event]:
    place = {"item_id": item["id"], "output_index": index}
    if item["type"] == "function_call":
        told = {"name": item["name"], "arguments": item["arguments"]}
        yield {"type": "response.function_call_arguments.done", **place, **told}
    else:
        part = item["content"][0]
        if part["type"] == "refusal":
            yield {"type": "response.refusal.done", **place, "content_index": 0, "refusal": part["refusal"]}
        else:
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            yield {"type": "response.output_text.done", **place, "content_index": 0, **text}
        yield {"type": "response.content_part.done", **place, "content_index": 0, "part": _copied(part)}
    yield _item_event("response.output_item.done", index, item)


def told_again(response: dict[str, Any]) -> Iterator[Event]:
    """The events of a response that has ended and whose own are not kept: each text and call in one piece."""
    begun = {**response, "status": "in_progress", "output": [], "usage": None, "completed_at": None}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for index, item in enumerate(response["output"]):
        empty: Event = {"content": []} if item["type"] == "message" else {"arguments": ""}
        yield _item_event("response.output_item.added", index, {**item, **empty, "status": "in_progress"})
        place = {"item_id": item["id"], "output_index": index}
        if item["type"] == "message":
            yield from _told_part(item["content"][0], place)
        else:
            yield {"type": "response.function_call_arguments.delta", **place, "delta": item["arguments"]}
        yield from _closing_events(item, index)
    yield {"type": f"response.{response['status']}", "response": response}


def repadded(event: bytes, *, is_padded: bool) -> bytes:
    """An encoded event with padding or without it, however it was written."""
    told: Event = msgspec.json.decode(event)
    if told["type"] in _PADDED and is_padded != ("obfuscation" in told):
        if is_padded:
            told["obfuscation"] = padding({"content": told["delta"]})
        else:
            del told["obfuscation"]
        return encode(told)
    return event


def _told_part(part: Event, place: Event) -> Iterator[Event]:
    is_refusal = part["type"] == "refusal"
    empty: Event = {"refusal": ""} if is_refusal else {"text": "", "annotations": [], "logprobs": []}
    yield {
        "type": "response.content_part.added",
        **place,
        "content_index": 0,
        "part": {"type": part["type"], **empty},
    }
    if is_refusal:
        yield {"type": "response.refusal.delta", **place, "content_index": 0, "delta": part["refusal"]}
    else:
        told = {"delta": part["text"], "logprobs": part["logprobs"]}
        yield {"type": "response.output_text.delta", **place, "content_index": 0, **told}


def _item_event(kind: str, index: int, item: dict[str, Any]) -> Event:
    return {"type": kind, "output_index": index, "item": _copied(item)}


def _copied(value: dict[str, Any]) -> dict[str, Any]:
    """A copy that later words do not change."""
    return {key: list(item) if isinstance(item, list) else item for key, item in value.items()}
