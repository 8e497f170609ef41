"""Patterns over the names of modules, as PEFT's settings hold them: Python's regular expressions, matched safely.

Layer 4, beneath peft.py. A pattern comes from a stranger, and Python's own engine may take for ever over one such as
`(a+)+`. Here it becomes a machine without memory whose states are followed side by side (Thompson 1968, "Regular
expression search algorithm"), so that matching takes no longer than the states times the name's letters. What cannot
be had that way, back references and looking ahead or behind, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

MAX_STATES = 1000  # a pattern that needs more, by its counts, names no modules
MAX_DEPTH = 50

_PLAIN = re.compile(r"\^?[\w.]*\$?")  # nearly all are: nothing in them repeats, so Python's engine cannot linger
_ESCAPED_KINDS = "dDsSwW"
_COUNT = re.compile(r"\{(\d{1,4})\}|\{(\d{0,4}),(\d{0,4})\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
_NESTED = re.compile(r"\[\^?.*(?:\[|--|&&|~~|\|\|)")  # what Python warns that it may read otherwise one day

# Puts what a part of the pattern means before the state `after`, and returns the state in which it begins.
_Part = Callable[["NamePattern", int], int]


@dataclass(eq=False)
class _State:
    """`test` is of one letter; None leads on without reading, at the beginning or the end of the name alone if `place`
    says so."""

    test: re.Pattern[str] | None
    nexts: list[int]
    place: str = ""


@dataclass(eq=False)
class NamePattern:
    """`matches` tells what `re.match(rf"(.*\\.)?({text})$", name)` would: a whole name, or its end after a dot.

    ValueError if `text` is no regular expression, or one that is not supported, in a few words.
    """

    text: str
    _states: list[_State] = field(default_factory=list, init=False)
    _first: int = field(default=0, init=False)
    _plain: re.Pattern[str] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if _PLAIN.fullmatch(self.text):
            self._plain = re.compile(rf"(?:.*\.)?(?:{self.text})$")
            return
        accepted = self._add(None, [])
        assert accepted == 0
        self._first = _Reader(self.text).whole()(self, accepted)

    @property
    def num_states(self) -> int:
        """What it takes in memory, some 200 bytes each."""
        return len(self._states)

    def matches(self, name: str) -> bool:
        if self._plain is not None:
            return self._plain.match(name) is not None
        current: set[int] = set()
        for place, letter in enumerate(name):
            begins = [self._first] if place == 0 or name[place - 1] == "." else []
            current = self._led_on({*current, *begins}, place, len(name))
            read = (state for i in current if (state := self._states[i]).test and state.test.match(letter))
            current = {i for state in read for i in state.nexts}
        begins = [self._first] if not name or name[-1] == "." else []
        return 0 in self._led_on({*current, *begins}, len(name), len(name))

    def _led_on(self, states: Iterable[int], place: int, end: int) -> set[int]:
        """These states and all that they lead to without a letter."""
        found, left = set[int](), list(states)
        while left:
            number = left.pop()
            state = self._states[number]
            is_here = {"": True, "^": place == 0, "$": place == end}[state.place]
            if number not in found and (state.test is not None or is_here):
                found.add(number)
                left += state.nexts if state.test is None else []
        return found

    def _add(self, test: re.Pattern[str] | None, nexts: list[int], place: str = "") -> int:
        if len(self._states) >= MAX_STATES:
            raise ValueError("it counts too far")
        self._states.append(_State(test, nexts, place))
        return len(self._states) - 1

    # The parts of a pattern.

    def letter(self, after: int, *, test: re.Pattern[str]) -> int:
        return self._add(test, [after])

    def anchor(self, after: int, *, place: str) -> int:
        return self._add(None, [after], place)

    def sequence(self, after: int, *, parts: Sequence[_Part]) -> int:
        for part in reversed(parts):
            after = part(self, after)
        return after

    def either(self, after: int, *, branches: Sequence[_Part]) -> int:
        return self._add(None, [branch(self, after) for branch in branches])

    def repeated(self, after: int, *, part: _Part, least: int, most: int | None) -> int:
        if most is None:
            again = self._add(None, [after])
            self._states[again].nexts.append(part(self, again))
            after = again
        for _ in range((most or least) - least):
            after = self._add(None, [after, part(self, after)])
        for _ in range(least):
            after = part(self, after)
        return after


class _Reader:
    """Reads a pattern from left to right."""

    def __init__(self, text: str) -> None:
        self._text, self._place = text, 0

    def whole(self) -> _Part:
        part = self._alternatives(0)
        if self._place < len(self._text):
            raise ValueError("a ')' closes nothing")
        return part

    def _alternatives(self, depth: int) -> _Part:
        if depth > MAX_DEPTH:
            raise ValueError("its groups are too deep")
        branches = [self._sequence(depth)]
        while self._take("|"):
            branches.append(self._sequence(depth))
        return partial(NamePattern.either, branches=branches)

    def _sequence(self, depth: int) -> _Part:
        parts = []
        while self._place < len(self._text) and self._text[self._place] not in "|)":
            parts.append(self._counted(self._atom(depth)))
        return partial(NamePattern.sequence, parts=parts)

    def _counted(self, part: _Part) -> _Part:
        bounds = self._bounds()
        if bounds is None:
            return part
        least, most = bounds
        if most is not None and most < least:
            raise ValueError("it counts to less than it begins with")
        self._take("?")  # lazy: the same names, found in another order
        if self._peek() in ("*", "+", "?") or self._bounds() is not None:
            raise ValueError("it repeats what is repeated already")
        return partial(NamePattern.repeated, part=part, least=least, most=most)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in {"*": (0, None), "+": (1, None), "?": (0, 1)}.items():
            if self._take(sign):
                return bounds
        match = _COUNT.match(self._text, self._place)
        if match is None:
            return None
        self._place = match.end()
        if match[1] is not None:
            return int(match[1]), int(match[1])
        return int(match[2] or 0), int(match[3]) if match[3] else None

    def _atom(self, depth: int) -> _Part:
        sign = self._text[self._place]
        if sign == "[":
            return self._class()
        self._place += 1
        if sign == "(":
            return self._group(depth)
        if sign in "^$":
            return partial(NamePattern.anchor, place=sign)
        if sign in "*+?{":
            raise ValueError(f"'{sign}' repeats nothing")
        if sign == "\\":
            return self._escaped()
        return _letter("." if sign == "." else re.escape(sign))

    def _group(self, depth: int) -> _Part:
        if self._take("?") and not self._take(":"):
            raise ValueError("groups that look ahead or behind, or set flags, are not supported")
        part = self._alternatives(depth + 1)
        if not self._take(")"):
            raise ValueError("a '(' is not closed")
        return part

    def _escaped(self) -> _Part:
        letter = self._peek()
        self._place += 1
        if not letter or (letter.isascii() and letter.isalnum() and letter not in _ESCAPED_KINDS):
            raise ValueError(f"'\\{letter}' is not supported")
        return _letter("\\" + letter)

    def _class(self) -> _Part:
        match = _CLASS.match(self._text, self._place)
        if match is None or _NESTED.match(match[0]):
            raise ValueError("a '[' is not closed, or holds another")
        self._place = match.end()
        return _letter(match[0])

    def _peek(self) -> str:
        return self._text[self._place : self._place + 1]

    def _take(self, sign: str) -> bool:
        is_there = self._peek() == sign
        self._place += is_there
        return is_there


def _letter(text: str) -> _Part:
    try:
        return partial(NamePattern.letter, test=re.compile(text))
    except re.error as error:
        raise ValueError(f"'{text}' is not supported ({error.msg})") from error
