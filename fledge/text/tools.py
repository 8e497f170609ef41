"""Tools: functions that the assistant may call, how it is told of them, held to them, and read.

Layer 2, beside chat.py. A call is text in the assistant's message (`types.CallPart`), in one of the styles that models
are trained on; `call_grammar` makes a grammar of the tools and the caller's choice, so that a model that is held to it
can only write calls that are valid, and `CallReader` finds the calls again while the text is still coming in.
The fields and the choices are OpenAI's (openapi 2.3.0, chat completions).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fledge.errors import UserError
from fledge.text.json_schema import parse_schema, reduce_schema
from fledge.types import CallPart, Conversation, Grammar, Message, TextPart

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_TOOLS = 128

# "auto": text, calls, or both. "required": at least one call and nothing else.
Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Tool:
    """A function: `parameters` is the JSON schema of its arguments, as text.

    `strict`: a schema that cannot be enforced in full is refused. Otherwise such a function's arguments are only held
    to being a JSON object.
    """

    name: str
    description: str = ""
    parameters: str = '{"type": "object", "properties": {}}'
    strict: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(f"a tool's name has 1 to 64 letters, digits, _ or -, got '{self.name[:80]}'")
        schema = parse_schema(self.parameters)
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            raise UserError(f"the parameters of tool '{self.name}' must be a JSON schema of type object")
        if self.strict:
            self.enforced()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Tool:
        """From OpenAI's form, `{"type": "function", "function": {...}}`, or what stands inside."""
        if not isinstance(given, Mapping) or given.get("type", "function") != "function":
            raise UserError("only tools of type 'function' are known")
        inner = given.get("function", given)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise UserError("a tool needs a name: {'type': 'function', 'function': {'name': ...}}")
        parameters = inner.get("parameters") or {"type": "object", "properties": {}}
        description, strict = inner.get("description") or "", bool(inner.get("strict"))
        if not isinstance(description, str):
            raise UserError(f"the description of tool '{inner['name']}' is no text")
        return cls(inner["name"], description, json.dumps(parameters), strict)

    def to_json(self) -> dict[str, Any]:
        """OpenAI's form, which imported chat templates expect."""
        about = {
            "name": self.name,
            "description": self.description,
            "parameters": json.loads(self.parameters),
        }
        return {"type": "function", "function": about}

    def enforced(self) -> dict[str, Any]:
        """The schema that arguments are held to. `UserError` names the tool and what cannot be enforced."""
        try:
            schema = {"type": "object", **json.loads(self.parameters)}
            schema["x-guidance"] = {**_SPELLING, **schema.get("x-guidance", {})}
            return reduce_schema(schema)
        except UserError as error:
            if self.strict:
                raise UserError(f"tool '{self.name}': {error}") from None
            return reduce_schema({"type": "object", "x-guidance": _SPELLING})


_NO_BRACE = r"\s*[^{\s](.|\n)*"  # a text that does not begin with one

# Calls are spelled with or without a space after a comma and a colon: both stand in training data.
_SPELLING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


@dataclass(frozen=True)
class CallStyle:
    """How a call is written: `open`, then `{"name": ..., "<key>": {...}}`, then `close`.

    With an empty `open` the whole message is one call, which shows by its starting with a brace.
    """

    open: str
    close: str
    key: str

    @property
    def is_whole_message(self) -> bool:
        return not self.open

    def head(self, name: str) -> str:
        return f'{self.open}{{"name": {json.dumps(name)}, "{self.key}": '

    @property
    def tail(self) -> str:
        return "}" + self.close


STYLES: Mapping[str, CallStyle] = {
    "fledge": CallStyle("<tool_call>\n", "\n</tool_call>", "arguments"),  # as types.CallPart.text spells it
    "hermes": CallStyle("<tool_call>\n", "\n</tool_call>", "arguments"),  # Hermes 2 Pro, Qwen 2.5 and 3
    "llama3": CallStyle("", "", "parameters"),  # Llama 3.1, "JSON based tool calling"
}


def show_tools(conversation: Conversation) -> Conversation:
    """The conversation with its `tools` written into the system message: what fledge's own template renders."""
    if not conversation.tools:
        return conversation
    tools = [Tool.of(json.loads(text)) for text in conversation.tools]
    listed = "\n".join(json.dumps(tool.to_json()["function"], ensure_ascii=False) for tool in tools)
    example = CallPart("NAME", "{...}").text
    text = f"You can call these functions:\n{listed}\nTo call one, write:\n{example}"
    first, *rest = conversation.messages or (Message.of("system", ""),)
    if first.role == "system":
        shown = (replace(first, parts=(TextPart(f"{first.text}\n\n{text}".strip()),)), *rest)
    else:
        shown = (Message.of("system", text), *conversation.messages)
    return replace(conversation, messages=shown, tools=())


def call_grammar(
    tools: Sequence[Tool],
    choice: Choice | str,
    style: CallStyle,
    *,
    is_parallel: bool = True,
    said: Grammar | None = None,
) -> Grammar | None:
    """The grammar of an answer under these tools; None where anything may be said.

    `choice` is one of `Choice` or the name of the tool to be called; `said` the form, a JSON schema or object, of an
    answer without calls ("auto" then means calls or that, not both). `UserError` for a name that no tool or two tools
    have, a choice that needs tools where there are none, and a strict tool or a schema that cannot be enforced.
    """
    names = [tool.name for tool in tools]
    if len(tools) > MAX_TOOLS or len(set(names)) < len(names):
        raise UserError(f"tools need names of their own, and at most {MAX_TOOLS} are taken, got {len(tools)}")
    if said is not None and (choice == "none" or not tools):
        return said
    if choice == "none" or (choice == "auto" and not tools):
        return Grammar("lark", _without_calls(style)) if tools else None
    if choice not in ("auto", "required"):
        tools = [tool for tool in tools if tool.name == choice]
    if not tools:
        raise UserError(f"tool_choice '{choice}' names no tool; known are {', '.join(names) or 'none'}")
    rules = _rules_of_calls(tools, style)
    if choice != "auto":
        return Grammar("lark", "\n".join((f"start: {_only_calls(style, is_parallel)}", *rules)))
    if said is None:
        return Grammar("lark", "\n".join((*_free_text_and_calls(style, is_parallel), *rules)))
    schema = {"type": "object"} if said.kind == "json_object" else parse_schema(said.text)
    form = f"said: %json {json.dumps(reduce_schema(schema), ensure_ascii=False)}"
    return Grammar("lark", "\n".join((f"start: {_only_calls(style, is_parallel)} | said", form, *rules)))


def _only_calls(style: CallStyle, is_parallel: bool) -> str:
    if style.is_whole_message:
        return "call"
    opening = json.dumps(style.open)
    return f'{opening} call ("\\n" {opening} call)*' if is_parallel else f"{opening} call"


def _free_text_and_calls(style: CallStyle, is_parallel: bool) -> Iterator[str]:
    if style.is_whole_message:
        yield rf"start: call | /{_NO_BRACE}/"
        return
    # A lazy rule ends as soon as it can: what opens a call is never swallowed by the text.
    yield r"start: (opened call)* said" if is_parallel else "start: said | opened call"
    yield rf"opened[lazy]: /(.|\n)*{_escaped(style.open)}/"
    yield r"said: /(.|\n)*/"


def _rules_of_calls(tools: Sequence[Tool], style: CallStyle) -> Iterator[str]:
    yield "call: " + " | ".join(f"call_{i}" for i in range(len(tools)))
    for i, tool in enumerate(tools):
        head, tail = style.head(tool.name).removeprefix(style.open), style.tail
        yield f"call_{i}: {json.dumps(head)} arguments_{i} {json.dumps(tail)}"
        yield f"arguments_{i}: %json {json.dumps(tool.enforced(), ensure_ascii=False)}"


def _without_calls(style: CallStyle) -> str:
    if style.is_whole_message:
        return f"start: /({_NO_BRACE})?/"
    opening = _escaped(style.open.strip())
    return f"start: SAID\nSAID: /(.|\\n)*/ & ~/(?s:.*){opening}(?s:.*)/"


def _escaped(text: str) -> str:
    """A text as part of a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")


@dataclass(frozen=True)
class CallDelta:
    """A piece of call `index`. The first one carries its `name` and `id`; the `arguments` of all, joined, are JSON."""

    index: int
    arguments: str = ""
    name: str | None = None
    id: str | None = None


@dataclass
class CallReader:
    """Reads an answer as it comes: `push` text, `finish` at its end; both return stretches of text and of calls.

    Text that may turn out to open a call is held back. What looks like a call but is none (no JSON, or a name that is
    not among `names`) comes out as the text that it is. Arguments are passed on as they are written, so an answer that
    is cut short leaves them unfinished.
    """

    style: CallStyle
    names: Collection[str]
    new_id: Callable[[int], str] = "call_{}".format
    num_calls: int = 0
    _state: Literal["start", "text", "head", "arguments", "tail"] = "start"
    _held: str = ""
    _depth: int = 0
    _is_quoted: bool = False
    _out: list[str | CallDelta] = field(default_factory=list)

    def push(self, text: str) -> list[str | CallDelta]:
        self._held += text
        steps = {
            "start": self._read_start,
            "text": self._read_text,
            "head": self._read_head,
            "arguments": self._read_arguments,
            "tail": self._read_tail,
        }
        while steps[self._state]():
            pass
        return self._taken()

    def finish(self) -> list[str | CallDelta]:
        """What is left: text that was held back, and a call that was not begun in earnest."""
        if self._state == "head" and not self._read_whole(self._held):
            self._say(self.style.open + self._held)
        elif self._state in ("start", "text") and (self._held.strip() or not self.num_calls):
            self._say(self._held)
        self._held = ""
        return self._taken()

    # Each step reads what it can from `_held`; true if the next state should go on at once.

    def _read_start(self) -> bool:
        if not self.style.is_whole_message:
            return self._go("text")
        begin = self._held.lstrip()
        return bool(begin) and self._go("head" if begin.startswith("{") else "text")

    def _read_text(self) -> bool:
        if self.style.is_whole_message:
            self._say(self._held)
            self._held = ""
            return False
        mark = self.style.open.strip()
        before, found, after = self._held.partition(mark)
        if found:
            if before.strip() or not self.num_calls:
                self._say(before)
            self._held = after
            return self._go("head")
        sure = len(self._held) - _overlap(self._held, mark)
        if self.num_calls and not self._held[:sure].strip():
            return False  # white space between calls is nobody's text
        self._say(self._held[:sure])
        self._held = self._held[sure:]
        return False

    def _read_head(self) -> bool:
        pattern = rf'\s*\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{self.style.key}"\s*:\s*(?=\{{)'
        match = re.match(pattern, self._held)
        if match and _loaded(match[1]) in self.names:
            self._begin(str(_loaded(match[1])))
            self._held = self._held[match.end() :]
            self._depth, self._is_quoted = 0, False
            return self._go("arguments")
        mark = self.style.close.strip()
        if not mark or mark not in self._held:
            return False
        whole, _, after = self._held.partition(mark)
        if not self._read_whole(whole):
            self._say(f"{self.style.open.strip()}{whole}{mark}")
        self._held = after
        return self._go("text")

    def _read_arguments(self) -> bool:
        for match in re.finditer(r'\\.|["{}\[\]]', self._held, re.DOTALL):
            mark = match[0]
            if mark == '"':
                self._is_quoted = not self._is_quoted
            elif not self._is_quoted and mark[0] != "\\":
                self._depth += 1 if mark in "{[" else -1
                if self._depth == 0:
                    self._continue(self._held[: match.end()])
                    self._held = self._held[match.end() :]
                    return self._go("tail")
        return self._pass_arguments_on()

    def _pass_arguments_on(self) -> bool:
        """Give out what is held, but for a backslash at its end: what follows belongs to it."""
        is_cut = re.search(r"(?<!\\)(?:\\\\)*\\$", self._held) is not None
        sure = len(self._held) - is_cut
        self._continue(self._held[:sure])
        self._held = self._held[sure:]
        return False

    def _read_tail(self) -> bool:
        mark = self.style.close.strip()
        if not mark or mark not in self._held:
            return False
        self._held = self._held.partition(mark)[2]
        return self._go("text")

    def _read_whole(self, text: str) -> bool:
        """A complete call whose fields are spelled in another way or order; false if it is none."""
        call = _loaded(text)
        if not isinstance(call, dict) or call.get("name") not in self.names:
            return False
        arguments = call.get(self.style.key, {})
        if isinstance(arguments, str):  # JSON inside JSON, as the API has it
            arguments = _loaded(arguments)
        if not isinstance(arguments, dict):
            return False
        self._begin(call["name"])
        self._continue(json.dumps(arguments, ensure_ascii=False))
        return True

    def _go(self, state: Literal["text", "head", "arguments", "tail"]) -> bool:
        self._state = state
        return True

    def _say(self, text: str) -> None:
        if text:
            self._out.append(text)

    def _begin(self, name: str) -> None:
        self._out.append(CallDelta(self.num_calls, "", name, self.new_id(self.num_calls)))
        self.num_calls += 1

    def _continue(self, arguments: str) -> None:
        if arguments:
            self._out.append(CallDelta(self.num_calls - 1, arguments))

    def _taken(self) -> list[str | CallDelta]:
        out, self._out = self._out, []
        return out


def read_calls(text: str, style: CallStyle, names: Collection[str]) -> Message:
    """The assistant's message that a whole answer amounts to: its text and its calls, in order."""
    reader = CallReader(style, names)
    parts: list[TextPart | CallPart] = []
    for piece in [*reader.push(text), *reader.finish()]:
        last = parts[-1] if parts else None
        if isinstance(piece, str) and isinstance(last, TextPart):
            parts[-1] = TextPart(last.text + piece)
        elif isinstance(piece, str):
            parts.append(TextPart(piece))
        elif piece.name is not None:
            parts.append(CallPart(piece.name, piece.arguments, piece.id))
        elif isinstance(last, CallPart):
            parts[-1] = replace(last, arguments=last.arguments + piece.arguments)
    return Message("assistant", tuple(parts))


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
