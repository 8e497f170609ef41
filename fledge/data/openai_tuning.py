"""OpenAI's fine-tuning files: chats (`messages`, `tools`, a `weight` an answer) and preferences (`input`,
`preferred_output`, `non_preferred_output`).

Arguments of calls are JSON text; weight 0 makes an answer context only. Source: OpenAI's guides to supervised and
direct preference fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fledge.data.feedback import FeedbackExample, cannot_write
from fledge.data.messages import (
    as_text,
    one_answer,
    read_tools,
    read_turns,
    require_answer,
    require_prompt,
    write_message,
    write_tools,
)
from fledge.data.records import BadRow, Intake, Row, each
from fledge.types import ChatExample, Conversation, Message, PairExample


def recognises(record: Mapping[str, Any]) -> bool:
    if {"input", "preferred_output", "non_preferred_output"} <= set(record):
        return True
    messages = record.get("messages")
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    return is_list and ("parallel_tool_calls" in record or any("weight" in message for message in messages or ()))


def read(rows: Iterable[Row], intake: Intake) -> Iterator[FeedbackExample]:
    """A pair or a conversation a row."""
    yield from each(rows, intake, lambda row: [_pair(row, intake) if row.has("input") else _chat(row, intake)])


def write(examples: Iterable[FeedbackExample]) -> Iterator[dict[str, Any]]:
    """Rows; `DataError` for what is neither a conversation nor a pair."""
    for example in examples:
        if isinstance(example, ChatExample):
            yield {"messages": _records(example.conversation.messages), **write_tools(example.conversation)}
        elif isinstance(example, PairExample):
            prompt = {"messages": _records(example.prompt.messages), **write_tools(example.prompt)}
            chosen, rejected = ([{"role": "assistant", "content": t}] for t in (example.chosen, example.rejected))
            yield {"input": prompt, "preferred_output": chosen, "non_preferred_output": rejected}
        else:
            raise cannot_write(example, "openai")


def _chat(row: Row, intake: Intake) -> ChatExample:
    messages = read_turns(row, "messages", "user")
    require_answer(messages, row.where)
    return ChatExample(Conversation(messages, read_tools(row)), row.provenance(intake))


def _pair(row: Row, intake: Intake) -> PairExample:
    given = row.object("input")
    messages = read_turns(given, "messages", "user")
    require_prompt(messages, given.where)
    keys = ("preferred_output", "non_preferred_output")
    chosen, rejected = (one_answer(read_turns(row, key, "assistant"), f"{row.where}, {key}") for key in keys)
    if chosen == rejected:
        raise BadRow("identical answers", row.where, "both outputs are the same text; drop the row")
    return PairExample(Conversation(messages, read_tools(given)), chosen, rejected, row.provenance(intake))


def _records(messages: Sequence[Message]) -> list[dict[str, Any]]:
    has_weights = not all(message.is_learned for message in messages)
    return [_record(message, has_weight=has_weights and message.role == "assistant") for message in messages]


def _record(message: Message, *, has_weight: bool) -> dict[str, Any]:
    record = write_message(message)
    for call in record.get("tool_calls", ()):
        call["function"]["arguments"] = as_text(call["function"]["arguments"])
    return record | ({"weight": int(message.is_learned)} if has_weight else {})
