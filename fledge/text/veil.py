"""What users write is hidden from a chat template behind placeholders, and put back into what it made of these.

Layer 2, beneath text/template.py, which tells why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fledge.errors import UserError
from fledge.text.sandbox import OPEN, OPEN_IN_ASCII, OPEN_IN_JSON
from fledge.types import Role

# A placeholder is a number in private-use characters, between two others; none of these is let through from anywhere.
_CLOSE, _ZERO = "\ue001", 0xE010
PRIVATE = re.compile("[\ue000-\ue0ff]")
_PLACEHOLDER = re.compile(f"([{OPEN}{OPEN_IN_JSON}{OPEN_IN_ASCII}][\ue010-\ue019]+){_CLOSE}")
APART = -1  # the message of what is hidden but no content


class Veil:
    """Hides contents behind placeholders, and puts them back into what a template made of these."""

    def __init__(self, special: re.Pattern[str], tags: frozenset[str]) -> None:
        self._unsafe = re.compile(f"{special.pattern}|{PRIVATE.pattern}")
        self._tags = re.compile("(" + "|".join(map(re.escape, sorted(tags))) + ")") if tags else None
        self._hidden: list[_Hidden] = []

    def content(self, number: int, text: str, role: Role) -> str:
        """What the template sees of a message: placeholders with the content's own white space around them, and, in
        what the assistant said, the tags that the template asks for."""
        parts = self._tags.split(text) if self._tags and role == "assistant" else [text]
        parts = parts if any(part.strip() for part in parts[::2]) else [text]  # tags alone are nothing to look for
        return "".join(part if index % 2 else self._hide(part, number) for index, part in enumerate(parts))

    def json(self, value: Any, number: int = APART) -> Any:
        """A JSON value of message `number` in which nothing could become a special token or a placeholder."""
        if isinstance(value, str):
            return self._unsafe.sub(lambda match: self._place(_Hidden(number, match[0], "", "")), value)
        if isinstance(value, Mapping):
            return {self.json(key, number): self.json(item, number) for key, item in value.items()}
        return [self.json(item, number) for item in value] if isinstance(value, list) else value

    def without_margins(self, content: str) -> str:
        """A result of `content` without the white space around its placeholders."""
        return re.sub(rf"\s*({_PLACEHOLDER.pattern})\s*", r"\1", content)

    def lift(self, text: str, again: Callable[[], str]) -> Iterator[tuple[str, int | None]]:
        """(text, number of the message whose content it is) of what a template made; None for its own text.

        White space around a placeholder is the content's if it was and the template left it: that shows by comparing
        with `again()`, which renders the contents without any. What is unclear stays with the template's text.
        """
        own, found = _PLACEHOLDER.split(text)[::2], _PLACEHOLDER.findall(text)
        if any(_number(one) >= len(self._hidden) for one in found):
            raise UserError("the model's chat template garbles what it is given")
        hidden = [self._hidden[_number(one)] for one in found]
        margins = [("", "")] * len(hidden)
        if any(one.before or one.after for one in hidden):
            bare = again()
            if _PLACEHOLDER.findall(bare) == found:
                own, margins = _margins(own, _PLACEHOLDER.split(bare)[::2], hidden)
        for literal, place, one, (before, after) in zip(own, found, hidden, margins, strict=False):
            yield literal, None
            yield before + _as_it_stands(one.text, place[0]) + after, one.message
        yield own[-1], None

    def _hide(self, text: str, message: int) -> str:
        core = text.strip()
        if not core:
            return text
        before, after = text[: text.index(core)], text[text.index(core) + len(core) :]
        return before + self._place(_Hidden(message, core, before, after)) + after

    def _place(self, hidden: _Hidden) -> str:
        self._hidden.append(hidden)
        return OPEN + "".join(chr(_ZERO + int(digit)) for digit in str(len(self._hidden) - 1)) + _CLOSE


@dataclass(frozen=True)
class _Hidden:
    """`text` of message number `message` (APART: of none), with the white space that stood around it."""

    message: int
    text: str
    before: str
    after: str


def _margins(
    own: Sequence[str], bare: Sequence[str], hidden: Sequence[_Hidden]
) -> tuple[list[str], list[tuple[str, str]]]:
    """The template's own texts without the contents' white space, and that of every content."""
    texts, before, after = [], [""] * len(hidden), [""] * len(hidden)
    for place, (literal, plain) in enumerate(zip(own, bare, strict=True)):
        tail = hidden[place - 1].after if place else ""
        head = hidden[place].before if place < len(hidden) else ""
        kept = [(a, b) for a, b in ((tail, head), (tail, ""), ("", head), ("", "")) if a + plain + b == literal]
        texts.append(plain if kept else literal)
        if kept and place:
            after[place - 1] = kept[0][0]
        if kept and place < len(hidden):
            before[place] = kept[0][1]
    return texts, list(zip(before, after, strict=True))


def _number(place: str) -> int:
    """The number in a placeholder, after what opens it."""
    return int("".join(str(ord(digit) - _ZERO) for digit in place[1:]))


def _as_it_stands(text: str, opening: str) -> str:
    """A content in the place of its placeholder, escaped if that is inside JSON."""
    return text if opening == OPEN else json.dumps(text, ensure_ascii=opening == OPEN_IN_ASCII)[1:-1]
