"""Messages as chat formats write them, `{"role", "content", "tool_calls"}`, and tools: read and written in one place.

Used by the TRL, label, OpenAI and verl formats. The layout is that of OpenAI's chat completions, which the chat
templates of Hugging Face take as well; both nest a call under "function" or leave it flat.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, get_args

from fledge.data.records import BadRow, Row, kind_of
from fledge.types import CallPart, Conversation, Message, Role, TextPart

ROLES: tuple[Role, ...] = get_args(Role)
# "developer" is what OpenAI calls the system's voice for newer models; "function" an older name of "tool".
_OTHER_NAMES: dict[str, Role] = {"developer": "system", "function": "tool"}


def read_turns(row: Row, key: str, role: Role) -> tuple[Message, ...]:
    """The messages under `key`: a list of them, or one text, which then is one message of `role`."""
    value = row.value(key)
    if isinstance(value, str):
        return (Message.of(role, row.checked(value, key)),)
    messages = tuple(read_message(each) for each in row.objects(key))
    if not messages:
        raise BadRow("empty text", f"{row.where}, {key}", "expected at least one message; fill it in or drop the row")
    return messages


def read_message(row: Row) -> Message:
    """One message. An assistant that calls functions may say nothing beside; everyone else must say something.

    A `weight` of 0 (OpenAI's) makes an assistant's message context only.
    """
    role = row.value("role")
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow("wrong role", row.where, f"{kind_of(role)}, expected one of {', '.join(ROLES)}; rename it")
    calls = tuple(_call(each) for each in row.objects("tool_calls")) if row.has("tool_calls") else ()
    if calls and role != "assistant":
        raise BadRow("wrong role", row.where, f"tool calls of a {role}, expected the assistant's; move or drop them")
    parts = _content(row, may_be_empty=bool(calls) or role == "tool")
    is_answer = role == "tool"
    name, call_id = (row.optional_text(key) if is_answer else None for key in ("name", "tool_call_id"))
    is_learned = row.flag("weight") if row.has("weight") and role == "assistant" else True
    return Message(role, (*parts, *calls), is_learned, name, call_id)


def read_tools(row: Row, key: str = "tools") -> tuple[str, ...]:
    """The functions under `key`: a list of JSON schemas, or that list as text (Parquet cannot hold the former)."""
    if not row.has(key):
        return ()
    value = row.value(key)
    if isinstance(value, str):
        value = parse_json(value, row, key) if value.strip() else []
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{row.where}, {key}", f"expected a list, got {kind_of(value)}; mend or drop it")
    return tuple(as_text(row.object_of(each, f"{key}[{place}]").record) for place, each in enumerate(value))


def write_message(message: Message) -> dict[str, Any]:
    """What `read_message` reads; `is_learned` is not part of the layout."""
    text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
    record: dict[str, Any] = {"role": message.role, "content": text}
    calls = [part for part in message.parts if isinstance(part, CallPart)]
    if calls:
        record["tool_calls"] = [_call_record(call) for call in calls]
    told = {"name": message.name, "tool_call_id": message.call_id}
    return record | {key: value for key, value in told.items() if value is not None}


def write_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [write_message(message) for message in messages]


def write_tools(conversation: Conversation) -> dict[str, Any]:
    """`{"tools": [...]}`, or nothing where there are none."""
    return {"tools": [json.loads(tool) for tool in conversation.tools]} if conversation.tools else {}


def as_text(value: Any) -> str:
    """JSON in its one spelling here: spaced, in the order it came, letters as they are."""
    return json.dumps(value, ensure_ascii=False)


def require_prompt(messages: Sequence[Message], where: str) -> None:
    """Turn away a prompt that is not one: without messages, or with the assistant speaking last."""
    if not messages or messages[-1].role == "assistant":
        found = "the assistant speaks last" if messages else "it has no messages"
        raise BadRow("wrong role", where, f"{found}, a prompt ends with the user or a tool; mend or drop the row")


def require_answer(messages: Sequence[Message], where: str) -> None:
    """Turn away a conversation of which nothing could be learned."""
    if not any(message.role == "assistant" for message in messages):
        raise BadRow("wrong role", where, "no message of the assistant's, nothing could be learned; mend or drop it")


def one_answer(messages: Sequence[Message], where: str) -> str:
    """The text of an answer that is one message of the assistant's."""
    if [message.role for message in messages] != ["assistant"]:
        roles = ", ".join(message.role for message in messages) or "nothing"
        raise BadRow("not one answer", where, f"expected one message of the assistant's, got {roles}; drop the row")
    return messages[0].text


def _content(row: Row, *, may_be_empty: bool) -> tuple[TextPart, ...]:
    value = row.record.get("content")
    if isinstance(value, list):  # content as parts, of which we know text
        texts = [row.object_of(part, f"content[{n}]").text("text", may_be_empty=True) for n, part in enumerate(value)]
        value = "".join(texts)
    if value is None and may_be_empty:
        return ()
    if value is None:
        value = row.value("content")
    text = row.checked(value, "content", may_be_empty=may_be_empty)
    return (TextPart(text),) if text else ()


def _call(row: Row) -> CallPart:
    """A call, nested under "function" or flat; its arguments an object or, as OpenAI has it, that object as text."""
    inner = row.object("function") if row.has("function") else row
    arguments = inner.value("arguments") if inner.has("arguments") else {}
    if isinstance(arguments, str):
        arguments = parse_json(arguments, inner, "arguments") if arguments.strip() else {}
    return CallPart(
        inner.text("name"), as_text(inner.object_of(arguments, "arguments").record), row.optional_text("id")
    )


def _call_record(call: CallPart) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    named = {} if call.id is None else {"id": call.id}
    return {**named, "type": "function", "function": function}


def parse_json(text: str, row: Row, key: str) -> Any:
    """JSON that stands in a row as text."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRow("not JSON", f"{row.where}, {key}", f"{error}; mend or drop the row") from error
