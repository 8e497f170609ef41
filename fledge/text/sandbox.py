"""Chat templates of other makers are programs in Jinja; here they run without being trusted.

Layer 2, beneath text/template.py. A template reaches nothing but the values it is given: jinja2's immutable sandbox
keeps it from Python's internals, and only the methods, filters and functions that chat templates use are there at all.
And it is metered: every turn of a loop, every call and every text that is put together costs, so that a template of
nested loops or of texts that double ends with an error after a second, not with the machine out of memory.
What is offered beyond plain Jinja is what `transformers` offers its templates: `raise_exception`, `strftime_now`, a
`tojson` that leaves HTML alone, `break` and `continue`, and the tag `generation`, which changes no text.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fledge.errors import TokenizerError, UserError

MAX_SOURCE_CHARS = 200_000  # the largest published templates have about 20,000
BUDGET = 20_000_000  # characters put together in one rendering; a conversation's contents are not among them
MAX_SECONDS = 2.0  # of this thread's own time
MAX_INT_BITS, MAX_JSON_INDENT = 128, 64
FILTER_NAMES = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length",
    "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round", "safe", "select", "selectattr",
    "sort", "string", "title", "trim", "unique", "upper",
)  # fmt: skip
METHODS = {
    str: {"capitalize", "endswith", "find", "isalpha", "isdigit", "join", "lower", "lstrip", "replace", "rstrip",
          "split", "splitlines", "startswith", "strip", "title", "upper", "rsplit", "removeprefix", "removesuffix"},
    dict: {"get", "items", "keys", "values"},
    list: {"index", "count"},
    LoopContext: {"changed", "cycle"},
}  # fmt: skip
OPERATORS = frozenset({"*", "**", "+", "%"})
TURNS, JOINED = "fledge_turns", "fledge_joined"  # filters that are put in when a template is read
# What opens a placeholder (template.py). `tojson` puts the others in its place, of plain and of ASCII JSON: what takes
# the place of the placeholder then stands inside a JSON string.
OPEN, OPEN_IN_JSON, OPEN_IN_ASCII = "\ue000", "\ue002", "\ue003"


class Meter:
    """What one rendering has left: characters and seconds."""

    def __init__(self) -> None:
        self._left = BUDGET
        self._end = time.thread_time() + MAX_SECONDS

    def charge(self, cost: int) -> None:
        self._left -= 1 + cost
        if self._left < 0 or time.thread_time() > self._end:
            raise SecurityError(f"it does too much work (over {BUDGET:,} characters or {MAX_SECONDS:g} seconds)")

    def charge_for(self, value: Any) -> None:
        """The size of a value as text, followed into lists and mappings."""
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, Mapping):
            for pair in value.items():
                self.charge_for(pair)
        elif isinstance(value, list | tuple):
            for item in value:
                self.charge_for(item)
        elif isinstance(value, int) and not isinstance(value, bool):
            self.charge(value.bit_length() // 3)
        else:
            self.charge(8)


_METER: ContextVar[Meter] = ContextVar("meter")


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says; it changes no text."""

    tags = {"generation"}  # noqa: RUF012  # the base class has it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """`macro_cost` is what a call of one of the template's own macros costs: as much as all of it can print."""

    intercepted_binops = OPERATORS

    def __init__(self, now: Callable[[], datetime], macro_cost: int) -> None:
        self.macro_cost = macro_cost
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation])
        self.filters = {name: _metered(FILTERS[name]) for name in FILTER_NAMES}
        self.filters |= {"tojson": _tojson, "join": _join, "replace": _replace, "indent": _indent}
        self.filters |= {TURNS: _turns, JOINED: _joined}
        kept = ("dict", "namespace", "range")
        self.globals = {name: value for name, value in self.globals.items() if name in kept}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: now().strftime(form)
        self.finalize = _charged
        self._functions = {id(value) for value in self.globals.values()}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"it uses '{operator}', which no chat template needs")
        meter = _METER.get()
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            sized, times = (right, left) if isinstance(left, int) else (left, right)
            meter.charge(len(sized) * max(0, int(times)))
        meter.charge_for([left, right])
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_INT_BITS:
            raise SecurityError(f"it counts beyond {MAX_INT_BITS} bits")
        return result

    def call(self, context: Any, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        meter, name = _METER.get(), getattr(target, "__name__", type(target).__name__)
        owner = getattr(target, "__self__", None)
        if isinstance(target, Macro):
            meter.charge(self.macro_cost)
        elif owner is not None and name in METHODS.get(type(owner), ()):
            _charge_method(meter, name, owner, args)
        elif not isinstance(target, Undefined) and id(target) not in self._functions:  # Undefined says what it lacks
            raise SecurityError(f"it calls '{name}', which is not allowed")
        meter.charge_for(args)
        return super().call(context, target, *args, **kwargs)


class ChatProgram:
    """A template that was read once and can be rendered often. `TokenizerError` if it is no Jinja or is too long.

    `now` tells the date to templates that ask for it.
    """

    def __init__(self, source: str, now: Callable[[], datetime] = datetime.now) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise TokenizerError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE_CHARS} are read")
        environment = _Sandbox(now, macro_cost=len(source))
        try:
            tree = environment.parse(source)
            _meter_loops(tree, environment)
            self._template = environment.from_string(tree)
        except (TemplateError, RecursionError, SyntaxError) as error:
            raise TokenizerError(f"the chat template is no Jinja that can be read ({error})") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. `UserError` says what the template refuses, or what in it is refused."""
        token = _METER.set(Meter())
        try:
            return self._template.render(variables)
        except SecurityError as error:
            raise UserError(f"the model's chat template is refused: {error}") from error
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"the model's chat template does not take this conversation: {error}") from error
        except RecursionError as error:
            raise UserError("the model's chat template is refused: it never ends calling itself") from error
        finally:
            _METER.reset(token)


def _meter_loops(tree: nodes.Template, environment: _Sandbox) -> None:
    """Have every loop pay for its turns, and every `~` for what it joins."""
    for loop in list(tree.find_all(nodes.For)):
        literal = sum(len(data.data) for data in loop.find_all(nodes.TemplateData))
        cost = [nodes.Const(literal, lineno=loop.lineno)]
        loop.iter = nodes.Filter(loop.iter, TURNS, cost, [], None, None, lineno=loop.lineno)
    for parent in list(tree.find_all(nodes.Node)):
        for name in parent.fields:
            value = getattr(parent, name)
            if isinstance(value, nodes.Concat):
                setattr(parent, name, _as_filter(value))
            elif isinstance(value, list):
                value[:] = [_as_filter(item) if isinstance(item, nodes.Concat) else item for item in value]
    tree.set_environment(environment)


def _as_filter(concat: nodes.Concat) -> nodes.Filter:
    parts = nodes.List(concat.nodes, lineno=concat.lineno)
    return nodes.Filter(parts, JOINED, [], [], None, None, lineno=concat.lineno)


def _turns(items: Iterable[Any], cost: int) -> Iterator[Any]:
    meter = _METER.get()
    for item in items:
        meter.charge(cost)
        yield item


def _joined(parts: list[Any]) -> str:
    _METER.get().charge_for(parts)
    return "".join(map(str, parts))


def _charged(value: Any) -> Any:
    """What `{{ }}` prints."""
    _METER.get().charge_for(value)
    return value


def _metered(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # also copies the marks by which jinja2 knows what else to pass
    def metered(*args: Any, **kwargs: Any) -> Any:
        for arg in args:
            if isinstance(arg, str | int | list | tuple | Mapping):
                _METER.get().charge_for(arg)
        return function(*args, **kwargs)

    return metered


def _join(parts: Iterable[Any], between: str = "", attribute: str | None = None) -> str:
    texts: list[str] = []
    for part in parts:
        value = part if attribute is None else part[attribute]
        _METER.get().charge_for([value, between])
        texts.append(str(value))
    return between.join(texts)


def _replace(text: Any, old: str, new: str, count: int = -1) -> str:
    text = str(text)
    _METER.get().charge(len(text) + (1 + text.count(old)) * len(new))
    replaced: str = text.replace(old, new, count)
    return replaced


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    lines = str(text).split("\n")
    _METER.get().charge(len(str(text)) + len(lines) * (max(0, width) if isinstance(width, int) else len(width)))
    by = " " * width if isinstance(width, int) else width
    starts = [by if (first if number == 0 else blank or line) else "" for number, line in enumerate(lines)]
    return "\n".join(start + line for start, line in zip(starts, lines, strict=True))


def _charge_method(meter: Meter, name: str, owner: Any, args: Sequence[Any]) -> None:
    """Charge, before the work, for the one text that a method reads and for what can grow beyond its arguments."""
    if not isinstance(owner, str):
        return
    meter.charge(len(owner))
    if name == "replace" and len(args) >= 2:
        meter.charge((1 + owner.count(args[0])) * len(args[1]))
    if name == "join" and args and isinstance(args[0], list | tuple):
        meter.charge(len(owner) * len(args[0]))


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    _METER.get().charge_for(value)
    if indent is not None and not (isinstance(indent, int) and indent <= MAX_JSON_INDENT):
        raise SecurityError(f"it indents JSON by more than {MAX_JSON_INDENT} columns")
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        text = re.sub(r"[^\0-\x7f\ue000-\ue0ff]", lambda match: json.dumps(match[0])[1:-1], text)
    return text.replace(OPEN, OPEN_IN_ASCII if ensure_ascii else OPEN_IN_JSON)
