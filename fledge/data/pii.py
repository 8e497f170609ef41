"""Personal data in prompts and answers: e-mail addresses, phone numbers, card numbers and IP addresses.

InstructGPT filtered all prompts of its training split for personally identifiable information (Ouyang et al. 2022,
section 3.2). Patterns find what has a form; names and postal addresses have none and stay. Card numbers must pass the
check digit of Luhn (ISO/IEC 7812-1, annex B), IPv4 and IPv6 must be addresses and not loopback or documentation ones.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

from fledge.data.feedback import FeedbackExample
from fledge.types import (
    CallPart,
    ChatExample,
    Conversation,
    PairExample,
    PromptExample,
    Ranking,
    StepsExample,
    TextExample,
    TextPart,
)

ExampleT = TypeVar("ExampleT", bound=FeedbackExample)
KINDS = ("email", "card", "ip", "phone")

_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,8}[A-Za-z]{2,24}(?![\w-])",
    re.ASCII,
)
_CARD = re.compile(r"(?<![0-9.-])[0-9](?:[ -]?[0-9]){12,18}(?![0-9]|[.-][0-9])")
_IPV4 = re.compile(r"(?<![0-9.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9]|\.[0-9])")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])", re.ASCII)
# A country code; or an area code in brackets or set off; or a Chinese mobile number. Years, sums and dates have none.
_PHONE = re.compile(
    r"(?<![0-9A-Za-z+.,/=-])(?:"
    r"\+[0-9]{1,3}(?:[ .-]?\(?[0-9]{1,4}\)?){2,5}"
    r"|\([0-9]{2,4}\)[ -]?[0-9]{3,4}[ -]?[0-9]{3,4}"
    r"|[0-9]{3}-[0-9]{3}-[0-9]{4}|[0-9]{3}\.[0-9]{3}\.[0-9]{4}|[0-9]{3} [0-9]{3} [0-9]{4}"
    r"|1[3-9][0-9][ -]?[0-9]{4}[ -]?[0-9]{4}"
    r"|0[0-9]{2,3}-[0-9]{7,8}"
    r")(?![0-9A-Za-z]|[.,/-][0-9])"
)


@dataclass(frozen=True)
class Finding:
    """A stretch `text[start:end]` of one of `KINDS`."""

    kind: str
    start: int
    end: int


@dataclass
class Taken:
    """What a filter took: findings by kind, examples with any, and examples seen."""

    findings: Counter[str] = field(default_factory=Counter)
    examples: int = 0
    seen: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"seen": self.seen, "examples": self.examples, "findings": dict(sorted(self.findings.items()))}


def find(text: str) -> list[Finding]:
    """All findings in order; where two overlap the kind that stands first in `KINDS` has it."""
    candidates = chain(
        (Finding("email", *found.span()) for found in _EMAIL.finditer(text)),
        (Finding("card", *found.span()) for found in _CARD.finditer(text) if passes_luhn(found[0])),
        (Finding("ip", *f.span()) for f in chain(_IPV4.finditer(text), _IPV6.finditer(text)) if _is_personal(f[0])),
        (Finding("phone", *found.span()) for found in _PHONE.finditer(text) if 7 <= _num_digits(found[0]) <= 15),
    )
    kept: list[Finding] = []
    for one in candidates:
        if all(one.end <= other.start or one.start >= other.end for other in kept):
            kept.append(one)
    return sorted(kept, key=lambda one: one.start)


def redact(text: str) -> tuple[str, list[Finding]]:
    """The text with every finding replaced by its kind in brackets ("[email]"), and the findings."""
    findings = find(text)
    parts, place = [], 0
    for one in findings:
        parts += [text[place : one.start], f"[{one.kind}]"]
        place = one.end
    return "".join([*parts, text[place:]]), findings


def without_pii(examples: Iterable[ExampleT], taken: Taken) -> Iterator[ExampleT]:
    """The examples in which nothing was found; `taken` counts the others."""
    for example in examples:
        if not _count(list(texts_of(example)), taken):
            yield example


def redacted(examples: Iterable[ExampleT], taken: Taken) -> Iterator[ExampleT]:
    """All examples, with findings replaced in prompts and answers; `taken` counts them."""
    for example in examples:
        yield _redacted(example) if _count(list(texts_of(example)), taken) else example


def texts_of(example: FeedbackExample) -> Iterator[str]:
    """Everything that is said in an example."""
    if isinstance(example, TextExample):
        yield example.text
        return
    talk = example.conversation if isinstance(example, ChatExample) else example.prompt
    yield from (part.arguments if isinstance(part, CallPart) else part.text for m in talk.messages for part in m.parts)
    if isinstance(example, PairExample):
        yield from (example.chosen, example.rejected)
    elif isinstance(example, Ranking):
        yield from example.completions
    elif isinstance(example, StepsExample):
        yield from example.steps
    elif not isinstance(example, ChatExample | PromptExample):
        yield example.completion


def passes_luhn(number: str) -> bool:
    """Whether 13 to 19 digits, blanks and hyphens between them, end with the right check digit."""
    digits = [int(letter) for letter in number if letter in "0123456789"]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    is_card = 13 <= len(digits) <= 19 and len(set(digits)) > 1  # a row of zeros passes and is no card
    return is_card and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_personal(address: str) -> bool:
    if ":" in address and sum(map(bool, address.split(":"))) < 3:
        return False  # a::b is a name in C++ before it is an address
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _num_digits(text: str) -> int:
    return sum(letter in "0123456789" for letter in text)


def _count(texts: Sequence[str], taken: Taken) -> bool:
    findings = [one.kind for text in texts for one in find(text)]
    taken.seen += 1
    taken.examples += bool(findings)
    taken.findings.update(findings)
    return bool(findings)


def _redacted(example: ExampleT) -> ExampleT:
    if isinstance(example, TextExample):
        return replace(example, text=_clean(example.text))
    if isinstance(example, ChatExample):
        return replace(example, conversation=_clean_talk(example.conversation))
    changed = replace(example, prompt=_clean_talk(example.prompt))
    if isinstance(changed, PairExample):
        changed = replace(changed, chosen=_clean(changed.chosen), rejected=_clean(changed.rejected))
    elif isinstance(changed, Ranking):
        changed = replace(changed, completions=tuple(map(_clean, changed.completions)))
    elif isinstance(changed, StepsExample):
        changed = replace(changed, steps=tuple(map(_clean, changed.steps)))
    elif not isinstance(changed, PromptExample):
        changed = replace(changed, completion=_clean(changed.completion))
    return changed


def _clean(text: str) -> str:
    return redact(text)[0]


def _clean_talk(talk: Conversation) -> Conversation:
    return replace(talk, messages=tuple(replace(m, parts=tuple(map(_clean_part, m.parts))) for m in talk.messages))


def _clean_part(part: TextPart | CallPart) -> TextPart | CallPart:
    if isinstance(part, CallPart):
        return replace(part, arguments=_clean(part.arguments))
    return TextPart(_clean(part.text))
