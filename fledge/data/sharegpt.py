"""ShareGPT: `{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}], "system", "tools"}`.

LLaMA-Factory's dialect: `function_call` turns hold the call as JSON text and `observation` turns its result; `chosen`
and `rejected` are turns; `kto_tag` says whether the last answer is desirable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fledge.data.feedback import FeedbackExample, cannot_write
from fledge.data.messages import (
    as_text,
    one_answer,
    parse_json,
    read_tools,
    require_answer,
    require_prompt,
)
from fledge.data.records import BadRow, Intake, Row, each, kind_of
from fledge.types import (
    CallPart,
    ChatExample,
    Conversation,
    Message,
    PairExample,
    Role,
    TextPart,
    UnpairedExample,
)


@dataclass(frozen=True)
class Tags:
    """What the keys and speakers are called; the names of the fields are those of dataset_info.json."""

    messages: str = "conversations"
    system: str = "system"
    tools: str = "tools"
    chosen: str = "chosen"
    rejected: str = "rejected"
    kto_tag: str = "kto_tag"
    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"

    def role(self, speaker: object) -> Role | None:
        """The role of a speaker; besides the tags, the names that other collections use."""
        names: dict[object, Role] = {"user": "user", "assistant": "assistant", "chatgpt": "assistant", "tool": "tool"}
        names |= {self.user_tag: "user", self.assistant_tag: "assistant", self.function_tag: "assistant"}
        names |= {self.observation_tag: "tool", self.system_tag: "system"}
        return names.get(speaker) if isinstance(speaker, str) else None


DEFAULT = Tags()


def recognises(record: Mapping[str, Any]) -> bool:
    turns = record.get("conversations")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def read(rows: Iterable[Row], intake: Intake, tags: Tags = DEFAULT) -> Iterator[FeedbackExample]:
    """An example a row: a pair where there is a chosen answer, a labelled answer where there is a tag, else a chat."""
    yield from each(rows, intake, lambda row: [_example(row, intake, tags)])


def write(examples: Iterable[FeedbackExample]) -> Iterator[dict[str, Any]]:
    """Rows in the default tags; `DataError` for what the format cannot hold."""
    for example in examples:
        if isinstance(example, ChatExample):
            yield _conversation_record(example, example.conversation)
        elif isinstance(example, PairExample):
            chosen, rejected = ({"from": "gpt", "value": text} for text in (example.chosen, example.rejected))
            yield {**_conversation_record(example, example.prompt), "chosen": chosen, "rejected": rejected}
        elif isinstance(example, UnpairedExample):
            whole = example.prompt.then("assistant", example.completion)
            yield {**_conversation_record(example, whole), "kto_tag": example.is_desirable}
        else:
            raise cannot_write(example, "sharegpt")


def _example(row: Row, intake: Intake, tags: Tags) -> FeedbackExample:
    messages = [_message(turn, tags) for turn in row.objects(tags.messages)]
    if system := row.text(tags.system, may_be_empty=True):
        messages.insert(0, Message.of("system", system))
    conversation = Conversation(tuple(messages), read_tools(row, tags.tools))
    origin = row.provenance(intake)
    if row.has(tags.chosen) or row.has(tags.rejected):
        chosen, rejected = (
            one_answer([_message(row.object(key), tags)], f"{row.where}, {key}") for key in (tags.chosen, tags.rejected)
        )
        if chosen == rejected:
            raise BadRow("identical answers", row.where, "chosen and rejected are the same text; drop the row")
        require_prompt(conversation.messages, f"{row.where}, {tags.messages}")
        return PairExample(conversation, chosen, rejected, origin)
    require_answer(conversation.messages, row.where)
    if row.has(tags.kto_tag):
        answer = one_answer(messages[-1:], f"{row.where}, {tags.messages}")
        prompt = Conversation(tuple(messages[:-1]), conversation.tools)
        require_prompt(prompt.messages, f"{row.where}, {tags.messages}")
        return UnpairedExample(prompt, answer, row.flag(tags.kto_tag), origin)
    return ChatExample(conversation, origin)


def _message(turn: Row, tags: Tags) -> Message:
    speaker = turn.value(tags.role_tag)
    role = tags.role(speaker)
    if role is None:
        known = [tags.user_tag, tags.assistant_tag, tags.system_tag, tags.observation_tag, tags.function_tag]
        raise BadRow("wrong role", turn.where, f"{kind_of(speaker)}, expected one of {', '.join(known)}; rename it")
    if speaker != tags.function_tag:
        return Message.of(role, turn.text(tags.content_tag))
    value = parse_json(turn.text(tags.content_tag), turn, tags.content_tag)
    calls = [turn.object_of(call, tags.content_tag) for call in (value if isinstance(value, list) else [value])]
    if not calls:
        raise BadRow("empty text", turn.where, "expected at least one call; mend or drop the row")
    return Message("assistant", tuple(_call(call) for call in calls))


def _call(call: Row) -> CallPart:
    arguments = call.value("arguments") if call.has("arguments") else {}
    if isinstance(arguments, str):
        arguments = parse_json(arguments, call, "arguments")
    return CallPart(call.text("name"), as_text(call.object_of(arguments, "arguments").record))


def _conversation_record(example: FeedbackExample, conversation: Conversation) -> dict[str, Any]:
    messages = list(conversation.messages)
    record: dict[str, Any] = {"system": messages.pop(0).text} if messages and messages[0].role == "system" else {}
    record["conversations"] = [_turn_record(example, message) for message in messages]
    # As text, because that is what LLaMA-Factory takes.
    return record | ({"tools": f"[{', '.join(conversation.tools)}]"} if conversation.tools else {})


def _turn_record(example: FeedbackExample, message: Message) -> dict[str, str]:
    calls = [part for part in message.parts if isinstance(part, CallPart)]
    texts = [part.text for part in message.parts if isinstance(part, TextPart)]
    if (calls and texts) or not message.is_learned or message.name or message.call_id:
        raise cannot_write(example, "sharegpt", "a turn is either text or calls, learned, and has no name or id")
    if any(call.id is not None for call in calls):
        raise cannot_write(example, "sharegpt", "its calls have ids")
    if calls:
        said = [f'{{"name": {as_text(call.name)}, "arguments": {call.arguments}}}' for call in calls]
        return {"from": "function_call", "value": said[0] if len(said) == 1 else f"[{', '.join(said)}]"}
    names = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
    return {"from": names[message.role], "value": message.text}
