"""Messages and tools on the wire become a conversation, and the grammar that the answer is held to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fledge.errors import UserError
from fledge.serve.chat_wire import ChatMessage, ChatRequest, ContentPart, FunctionSpec, ResponseFormat
from fledge.serve.errors import refused
from fledge.serve.wire import extras_of, unknown_field
from fledge.text.tools import CallStyle, Tool, call_grammar
from fledge.types import CallPart, Conversation, Grammar, Message, Role, TextPart

_ROLES: dict[str, Role] = {"developer": "system", "function": "tool"}
_TEXTS = ("text", "refusal")  # parts that are read


@dataclass(frozen=True)
class Toolbox:
    """The functions of a request and which of them the answer may or must call."""

    tools: tuple[Tool, ...] = ()
    choice: str = "auto"
    is_parallel: bool = True
    is_deprecated: bool = False  # asked for as `functions`, so answered as `function_call`

    @property
    def names(self) -> tuple[str, ...]:
        """Of the functions that may be called."""
        return () if self.choice == "none" else tuple(tool.name for tool in self.tools)


def to_conversation(messages: Sequence[ChatMessage], toolbox: Toolbox) -> Conversation:
    """400, naming the message, for a part that is no text or a call that is no function's."""
    called: dict[str, str] = {}
    found = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        parts: list[TextPart | CallPart] = []
        if text := _text(message, where):
            parts.append(TextPart(text))
        calls = _calls(message, where)
        called |= {call.id: call.name for call in calls if call.id is not None}
        role = _ROLES.get(message.role, message.role)
        name = called.get(message.tool_call_id or "", message.name) if role == "tool" else message.name
        found.append(Message(role, (*parts, *calls), name=name, call_id=message.tool_call_id))  # type: ignore[arg-type]
    shown = toolbox.tools if toolbox.choice != "none" else ()
    return Conversation(tuple(found), tuple(json.dumps(tool.to_json()) for tool in shown))


def notes_in(messages: Sequence[ChatMessage]) -> list[str]:
    """Fields of messages that are read by nobody, and so without effect: what a client library noted in the assistant's
    answer that it sends back, and what stands in parts beside their text. 400 for such a field in anybody else's
    message."""
    found = []
    for i, message in enumerate(messages):
        extras = extras_of(message, "messages", f"messages[{i}]")
        if extras and message.role != "assistant":
            raise unknown_field(f"messages[{i}].{extras[0].partition('.')[2]}")
        found += extras
        for k, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if part.type in _TEXTS:
                found += extras_of(part, "messages.content", f"messages[{i}].content[{k}]")
    return found


def _text(message: ChatMessage, where: str) -> str:
    content = message.content
    if message.audio is not None:
        raise refused("this model reads no audio", f"{where}.audio", "unsupported_parameter")
    if content is None:
        if message.role != "assistant":
            raise refused(f"a message of role '{message.role}' needs content", f"{where}.content", "invalid_value")
        return message.refusal or ""
    if isinstance(content, str):
        return content
    return "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _part(part: ContentPart, where: str) -> str:
    texts = {"text": part.text, "refusal": part.refusal}
    if part.type not in texts:
        message = f"the model reads text only, not '{part.type[:50]}'"
        raise refused(message, f"{where}.type", "unsupported_content")
    text = texts[part.type]
    if text is None:
        raise refused(f"a part of type '{part.type}' needs its text", f"{where}.{part.type}", "invalid_value")
    return text


def _calls(message: ChatMessage, where: str) -> list[CallPart]:
    calls = []
    for i, call in enumerate(message.tool_calls or ()):
        if call.function is None:
            place = f"{where}.tool_calls[{i}]"
            raise refused("only calls of functions are known", place, "unsupported_content")
        calls.append(CallPart(call.function.name, call.function.arguments, call.id))
    if message.function_call is not None:
        calls.append(CallPart(message.function_call.name, message.function_call.arguments))
    if calls and message.role != "assistant":
        raise refused("only the assistant calls functions", f"{where}.tool_calls", "invalid_value")
    return calls


def to_toolbox(body: ChatRequest) -> Toolbox:
    """The functions and the choice of a chat request."""
    is_parallel = body.parallel_tool_calls is not False
    if body.tools:
        specs = []
        for i, tool in enumerate(body.tools):
            if tool.type != "function" or tool.function is None:
                message = f"tools are functions here, not '{tool.type[:50]}'"
                raise refused(message, f"tools[{i}].type", "unsupported_tool")
            specs.append(tool.function)
        return make_toolbox(specs, body.tool_choice, is_parallel)
    if body.functions:
        choice: Any = body.function_call
        if isinstance(choice, dict):
            choice = {"type": "function", "function": choice}
        box = make_toolbox(body.functions, choice, is_parallel=False, place="functions")
        return Toolbox(box.tools, box.choice, is_parallel=False, is_deprecated=True)
    if body.tool_choice not in (None, "none", "auto"):
        raise refused("'tool_choice' is only allowed when 'tools' are specified", "tool_choice", "invalid_value")
    return Toolbox()


def make_toolbox(
    specs: Sequence[FunctionSpec],
    choice: str | dict[str, Any] | None,
    is_parallel: bool,
    place: str = "tools",
) -> Toolbox:
    """400, naming the tool, for one that cannot be enforced although it is strict."""
    chosen, allowed = _choice(choice)
    tools = []
    for i, spec in enumerate(specs):
        given = spec.model_dump(exclude_none=True)
        # Strictness is a promise about calls: where none may be made there is nothing to keep.
        given["strict"] = bool(spec.strict) and chosen != "none"
        try:
            tools.append(Tool.of(given))
        except UserError as error:
            raise refused(str(error), f"{place}[{i}]", "invalid_function_parameters") from None
    names = [tool.name for tool in tools]
    unknown = [name for name in allowed or () if name not in names]
    if chosen not in ("none", "auto", "required", *names) or unknown:
        missing = unknown[0] if unknown else chosen
        raise refused(f"no tool is named '{missing[:64]}'", "tool_choice", "invalid_value")
    kept = [tool for tool in tools if allowed is None or tool.name in allowed]
    return Toolbox(tuple(kept), chosen, is_parallel)


def _choice(given: str | dict[str, Any] | None) -> tuple[str, list[str] | None]:
    """The choice or the name that must be called, and the names that may be; None for all."""
    if given is None:
        return "auto", None
    complaint = refused(
        "'tool_choice' is none, auto, required, {'type': 'function', 'function': {'name': ...}}, or allowed_tools",
        "tool_choice",
        "invalid_value",
    )
    if isinstance(given, str):
        if given not in ("none", "auto", "required"):
            raise complaint
        return given, None
    inner = given.get("allowed_tools", given)
    if given.get("type") == "allowed_tools" and isinstance(inner, dict) and inner.get("mode") in ("auto", "required"):
        return inner["mode"], [_name_in(tool, complaint) for tool in inner.get("tools", [])]
    if given.get("type") != "function":
        raise complaint
    return _name_in(given, complaint), None


def _name_in(given: Any, complaint: Exception) -> str:
    """The name in either of its forms, `{"function": {"name": ...}}` and `{"name": ...}`."""
    inner = given.get("function", given) if isinstance(given, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str):
        raise complaint
    return name


def to_grammar(toolbox: Toolbox, form: ResponseFormat | None, style: CallStyle) -> Grammar | None:
    """What the answer is held to; None for any text."""
    said = None if form is None or form.type == "text" else _form(form)
    return call_grammar(toolbox.tools, toolbox.choice, style, is_parallel=toolbox.is_parallel, said=said)


def _form(form: ResponseFormat) -> Grammar:
    if form.type == "json_object":
        return Grammar("json_object")
    if form.json_schema is None:
        raise refused("'json_schema' is needed", "response_format.json_schema", "missing_required_parameter")
    schema = form.json_schema.schema_
    return Grammar("json_schema", json.dumps({} if schema is None else schema))
