"""JSON lines, one record each: `{"text"}`, `{"messages": [{"role", "content"}]}`, or `{"prompt", "completion"}`.

Those are the types of TRL and Hugging Face (language modelling, conversational, prompt-completion). A line may carry
an "id" and its "licence"; other keys are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from fledge.data.reading import Drops, Example, lines, shown
from fledge.errors import DataError
from fledge.types import ChatExample, Conversation, Message, Provenance, Role, TextExample

ROLES: tuple[Role, ...] = get_args(Role)
USER_LICENCE = "the user's own"


def file_examples(path: Path, source: str, *, bad: Drops | None = None) -> Iterator[Example]:
    """The examples of a JSONL file.

    A line that is no such record raises `DataError` naming file and line, or, given `bad`, is counted there.
    """
    for number, line in lines(path):
        where = f"{path}, line {number}"
        try:
            record = _parse(line, where)
            identity, licence = (
                _told(record, "id", f"{shown(path.name)}:{number}"),
                _told(record, "licence", USER_LICENCE),
            )
            yield record_example(record, source, identity, licence, where=where)
        except DataError:
            if bad is None:
                raise
            bad.add("not a usable JSON record", where)


def record_example(
    record: Mapping[str, Any], source: str, identity: str, licence: str, *, where: str = "record"
) -> Example:
    """The example a record stands for; `DataError` beginning with `where` if it stands for none."""
    provenance = Provenance(source, identity, licence)
    if record.get("messages") is not None:
        return ChatExample(_conversation(record["messages"], f"{where}: messages"), provenance)
    if record.get("prompt") is not None and record.get("completion") is not None:
        prompt = _turns(record["prompt"], "user", f"{where}: prompt")
        completion = _turns(record["completion"], "assistant", f"{where}: completion")
        return ChatExample(Conversation((*prompt, *completion)), provenance)
    if record.get("text") is not None:
        return TextExample(_text(record["text"], f"{where}: text"), provenance)
    raise DataError(
        f'{where} has the keys {", ".join(sorted(record)) or "(none)"}: expected "text", "messages", or "prompt" and '
        '"completion"; rename the key that holds the text'
    )


def example_to_json(example: Example) -> dict[str, Any]:
    """The record `record_example` reads back, with its provenance."""
    origin = example.provenance
    content: dict[str, Any]
    if isinstance(example, TextExample):
        content = {"text": example.text}
    else:
        messages = example.conversation.messages
        content = {"messages": [{"role": message.role, "content": message.text} for message in messages]}
    return {**content, "source": origin.source, "id": origin.id, "licence": origin.licence}


def _told(record: Mapping[str, Any], key: str, otherwise: str) -> str:
    value = record.get(key)
    return str(value) if isinstance(value, str | int) else otherwise


def _parse(line: str, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{where} is not JSON ({error}): expected one object a line; mend or delete the line"
        ) from error
    if not isinstance(record, dict):
        raise DataError(f'{where} is a JSON {type(record).__name__}: expected an object such as {{"text": ...}}')
    return record


def _turns(value: Any, role: Role, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message.of(role, value),)
    return _conversation(value, where).messages


def _conversation(value: Any, where: str) -> Conversation:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f'{where} is a {type(value).__name__}: expected a list of {{"role", "content"}} objects')
    return Conversation(tuple(_message(each, f"{where}[{number}]") for number, each in enumerate(value)))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping) or "role" not in value or "content" not in value:
        raise DataError(f'{where} is {json.dumps(value)[:80]}: expected an object with "role" and "content"')
    if value["role"] not in ROLES:
        raise DataError(f"{where} has role {value['role']!r}: expected one of {', '.join(ROLES)}; rename it")
    content = value["content"]
    if isinstance(content, list):  # content as parts, of which we know text
        content = "".join(_text(part.get("text") if isinstance(part, Mapping) else None, where) for part in content)
    return Message.of(value["role"], _text(content, where))


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is a {type(value).__name__}: expected a string; mend or delete the line")
    return value
