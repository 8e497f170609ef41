"""Input items of /v1/responses become a conversation; what came before them is found in the store."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fledge.serve.chat_messages import Toolbox, make_toolbox, to_grammar
from fledge.serve.chat_wire import FunctionSpec, JsonSchemaSpec, ResponseFormat
from fledge.serve.engine import ServedModel
from fledge.serve.errors import not_found, refused
from fledge.serve.responses_wire import (
    ConversationRef,
    EarlierContext,
    InputItem,
    InputPart,
    ResponseContext,
    ResponseTool,
)
from fledge.store.conversations import all_items, find_conversation
from fledge.store.database import Database
from fledge.store.pages import new_id
from fledge.store.responses import chain_of, find_said
from fledge.types import CallPart, Conversation, Grammar, Message, Role, TextPart

_ROLES: dict[str, Role] = {
    "developer": "system",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
_TEXTS = ("input_text", "output_text", "text", "refusal", "summary_text")
_NEEDED = {
    "message": "'role' and 'content'",
    "function_call": "'call_id', 'name' and 'arguments'",
    "function_call_output": "'call_id' and 'output'",
    "compaction": "'encrypted_content'",
}
Item = dict[str, Any]
SUMMARY = "What was said before, in short: "


async def own_items(database: Database, owner: str, body: EarlierContext) -> list[Item]:
    """The request's input as items with ids, as they are stored and listed, references replaced by what they name.
    400 names an item that is not known, 404 a reference to nothing."""
    given = body.input
    if given is None or given == "":
        return []
    if isinstance(given, str):
        given = [InputItem(role="user", content=given)]
    items = []
    for i, item in enumerate(given):
        where = f"input[{i}]"
        is_known = item.kind != "item_reference"
        items.append(_as_item(item, where) if is_known else await _referenced(database, owner, item, where))
    return items


async def _referenced(database: Database, owner: str, item: InputItem, where: str) -> Item:
    if item.id is None:
        raise refused("a reference needs the 'id' of an item", f"{where}.id", "missing_required_parameter")
    said = await find_said(database, owner, item.id)
    if said is None:
        raise not_found("item", item.id, f"{where}.id")
    return said


def as_items(given: Sequence[InputItem], place: str) -> list[Item]:
    """Items with ids, as they are stored and listed; `place` is where they stand in the request."""
    return [_as_item(item, f"{place}[{i}]") for i, item in enumerate(given)]


def _as_item(item: InputItem, where: str) -> Item:
    match item.kind:
        case "message" if item.role is not None and item.content is not None:
            kind = "output_text" if item.role == "assistant" else "input_text"
            return {
                "id": item.id or new_id("msg_"),
                "type": "message",
                "status": "completed",
                "role": item.role,
                "content": _parts(item.content, kind, f"{where}.content"),
            }
        case "function_call" if item.call_id and item.name and item.arguments is not None:
            call = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
            return {"id": item.id or new_id("fc_"), "type": "function_call", "status": "completed", **call}
        case "function_call_output" if item.call_id and item.output is not None:
            output = item.output
            if not isinstance(output, str):
                output = "".join(part["text"] for part in _parts(output, "input_text", f"{where}.output"))
            result = {"call_id": item.call_id, "output": output, "status": "completed"}
            return {"id": item.id or new_id("fco_"), "type": "function_call_output", **result}
        case "compaction" if item.encrypted_content is not None:
            if summary_in(item.encrypted_content) is None:
                raise refused("this compaction is none of this server's", f"{where}.encrypted_content", "invalid_value")
            content = {"encrypted_content": item.encrypted_content}
            return {"id": item.id or new_id("cmp_"), "type": "compaction", **content}
        case kind if kind in _NEEDED:
            message = f"an item of type '{kind}' needs {_NEEDED[kind]}"
            raise refused(message, where, "missing_required_parameter")
        case _:
            message = f"items of type '{item.kind[:50]}' are not supported"
            raise refused(message, f"{where}.type", "unsupported_content")


def _parts(content: str | list[InputPart], kind: str, where: str) -> list[Item]:
    if isinstance(content, str):
        content = [InputPart(type=kind, text=content)]
    shown = []
    for i, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in _TEXTS or text is None:
            message = f"the model reads text only, not '{part.type[:50]}'"
            raise refused(message, f"{where}[{i}]", "unsupported_content")
        extra: Item = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
        shown.append({"type": kind, "text": text, **extra})
    return shown


def sealed_summary(text: str) -> str:
    """What a compaction item carries: opaque to clients, but no secret of anybody's."""
    return base64.urlsafe_b64encode(json.dumps({"summary": text}).encode()).decode()


def summary_in(sealed: str) -> str | None:
    """None for what `sealed_summary` has not made."""
    try:
        found = json.loads(base64.urlsafe_b64decode(sealed))
    except (ValueError, RecursionError):
        return None
    text = found.get("summary") if isinstance(found, dict) else None
    return text if isinstance(text, str) else None


async def items_before(database: Database, owner: str, body: EarlierContext) -> list[Item]:
    """All that was said up to and in the previous response, or in the conversation; 404 if a part is not there."""
    previous_id, conversation_id = body.previous_response_id, conversation_id_of(body)
    if previous_id is not None and conversation_id is not None:
        message = "'conversation' and 'previous_response_id' both say what came before; give one of them"
        raise refused(message, "conversation", "invalid_value")
    if conversation_id is not None:
        if await find_conversation(database, owner, conversation_id) is None:
            raise not_found("conversation", conversation_id, "conversation")
        return await all_items(database, conversation_id)
    if previous_id is None:
        return []
    chain = await chain_of(database, owner, previous_id)
    if chain is None:
        raise not_found("previous response", previous_id, "previous_response_id")
    return [item for row in chain for item in (*row.inputs, *row.body.get("output", []))]


def conversation_id_of(body: EarlierContext) -> str | None:
    given = body.conversation
    return given.id if isinstance(given, ConversationRef) else given


def to_conversation(instructions: str | None, items: Sequence[Item], toolbox: Toolbox) -> Conversation:
    messages = [Message.of("system", instructions)] if instructions else []
    names: dict[str, str] = {}
    for item in items:
        if item["type"] == "message":
            text = "".join(part.get("text") or part.get("refusal", "") for part in item["content"])
            messages.append(Message.of(_ROLES[item["role"]], text))
        elif item["type"] == "function_call":
            names[item["call_id"]] = item["name"]
            _add_call(messages, CallPart(item["name"], item["arguments"], item["call_id"]))
        elif item["type"] == "compaction":
            messages.append(Message.of("system", SUMMARY + (summary_in(item["encrypted_content"]) or "")))
        else:
            part = (TextPart(item["output"]),)
            messages.append(Message("tool", part, name=names.get(item["call_id"]), call_id=item["call_id"]))
    shown = toolbox.tools if toolbox.choice != "none" else ()
    return Conversation(tuple(messages), tuple(json.dumps(tool.to_json()) for tool in shown))


def _add_call(messages: list[Message], call: CallPart) -> None:
    """A call belongs to what the assistant said just before it, if it said anything."""
    if messages and messages[-1].role == "assistant":
        messages[-1] = replace(messages[-1], parts=(*messages[-1].parts, call))
    else:
        messages.append(Message("assistant", (call,)))


def toolbox_of(body: ResponseContext) -> Toolbox:
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise refused("'tool_choice' is only allowed when 'tools' are specified", "tool_choice", "invalid_value")
        return Toolbox()
    specs = [_function(tool, i) for i, tool in enumerate(body.tools)]
    choice = body.tool_choice
    return make_toolbox(specs, choice, body.parallel_tool_calls is not False)


def _function(tool: ResponseTool, i: int) -> FunctionSpec:
    if tool.type != "function":
        message = f"tools are functions here, not '{tool.type[:50]}'"
        raise refused(message, f"tools[{i}].type", "unsupported_tool")
    if tool.name is None:
        raise refused("a function needs a name", f"tools[{i}].name", "missing_required_parameter")
    return FunctionSpec(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)


def grammar_of(body: ResponseContext, toolbox: Toolbox, model: ServedModel) -> Grammar | None:
    form = body.text.format if body.text else None
    if form is None:
        return to_grammar(toolbox, None, model.style)
    schema = None
    if form.type == "json_schema":
        if form.schema_ is None:
            raise refused("'schema' is needed", "text.format.schema", "missing_required_parameter")
        schema = JsonSchemaSpec(name=form.name or "schema", schema=form.schema_, strict=form.strict)
    return to_grammar(toolbox, ResponseFormat(type=form.type, json_schema=schema), model.style)


@dataclass(frozen=True)
class Reader:
    """Makes the prompt of a response. `room` is how many tokens it may have if the oldest messages may be dropped."""

    model: ServedModel
    room: int | None

    async def prompt(self, conversation: Conversation) -> tuple[int, ...]:
        return await asyncio.to_thread(self._prompt, conversation)

    def _prompt(self, conversation: Conversation) -> tuple[int, ...]:
        ids = self.model.renderer.prompt(conversation)
        while self.room is not None and len(ids) > self.room:
            messages = list(conversation.messages)
            oldest = next((i for i, message in enumerate(messages[:-1]) if message.role != "system"), None)
            if oldest is None:
                break
            del messages[oldest]
            conversation = replace(conversation, messages=tuple(messages))
            ids = self.model.renderer.prompt(conversation)
        return ids
