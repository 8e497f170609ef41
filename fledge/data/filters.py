"""What a document must pass before it may be trained on, and on which side of the split it falls.

The refinery's place: a filter is a function from text to a reason for dropping it, or None; `FILTERS` lists them in
the order they run. Duplicates and the split go by `document_key`, a hash of the text alone, so the same text is the
same document whichever source, stage or chat it came from, and always falls on the same side.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from fledge.config import check_range
from fledge.data.cutting import cut_prose
from fledge.data.reading import Example, Split
from fledge.errors import ConfigError
from fledge.types import CallPart, ChatExample, Conversation, TextExample, TextPart


@dataclass(frozen=True)
class FilterConfig:
    """Lengths are in characters. `validation_cap` bounds the validation bytes of one source; None: no bound."""

    min_chars: int = 8
    max_chars: int = 8_000  # longer documents are cut at paragraphs, so that one book lands on both sides of the split
    max_bad_share: float = 0.005  # share of control, replacement and unassigned-by-design characters
    min_messages: int = 2
    validation_share: float = 0.04
    validation_cap: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share must be between 0 and 1, got {self.validation_share}")
        check_range(self, "max_bad_share", 0, 1)
        check_range(self, "min_messages validation_cap", 1)
        if not 1 <= self.min_chars <= self.max_chars:
            raise ConfigError(f"expected 1 <= min_chars <= max_chars, got {self.min_chars} and {self.max_chars}")


DEFAULT = FilterConfig()
ExampleT = TypeVar("ExampleT", TextExample, ChatExample, Example)
Filter = Callable[[str, FilterConfig], str | None]

# C0 except tab, newline, form feed and carriage return; DEL and C1; the replacement character; noncharacters.
_BAD = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufffd\ufdd0-\ufdef\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def undecodable(text: str, config: FilterConfig) -> str | None:
    """Lone surrogates (legal in JSON, not in UTF-8) and NUL characters."""
    return "NUL or lone surrogate" if "\0" in text or _SURROGATE.search(text) else None


def garbled(text: str, config: FilterConfig) -> str | None:
    """Too many control and replacement characters: the trace of a wrong decoding."""
    num_bad = len(_BAD.findall(text))
    return "control or replacement characters" if num_bad > config.max_bad_share * len(text) else None


def too_short(text: str, config: FilterConfig) -> str | None:
    return f"shorter than {config.min_chars} characters" if len(text.strip()) < config.min_chars else None


FILTERS: tuple[Filter, ...] = (undecodable, garbled, too_short)
CHAT_FILTERS: tuple[Filter, ...] = (undecodable, garbled)


def example_text(example: Example) -> str:
    """The text by which an example is known: a document's own, or a conversation's messages, one a line."""
    if isinstance(example, TextExample):
        return example.text
    return "\n".join(message.text for message in example.conversation.messages)


def document_key(text: str) -> bytes:
    """16 bytes that name a text up to Unicode normalisation (NFC) and white space."""
    canonical = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def side(key: bytes, validation_share: float = DEFAULT.validation_share) -> Split:
    """The split of the document with this key. A smaller share gives a subset of the validation documents."""
    return "validation" if int.from_bytes(key[:8], "big") < validation_share * 2.0**64 else "train"


def select(
    examples: Iterable[ExampleT],
    split: Split,
    seed: int,
    *,
    buffer_size: int = 16_384,
    buffer_chars: int = 1 << 26,
) -> Iterator[ExampleT]:
    """The examples of one split, shuffled by `seed` within a sliding buffer.

    The buffer holds `buffer_size` examples and about `buffer_chars` characters, whichever is reached first.
    """
    rng = np.random.default_rng(seed)
    buffer: list[ExampleT] = []
    held_chars = 0
    for example in examples:
        text = example_text(example)
        if split != "all" and side(document_key(text)) != split:
            continue
        buffer.append(example)
        held_chars += len(text)
        if len(buffer) > buffer_size or held_chars > buffer_chars:
            place = int(rng.integers(len(buffer)))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            chosen = buffer.pop()
            held_chars -= len(example_text(chosen))
            yield chosen
    for place in rng.permutation(len(buffer)):
        yield buffer[place]


@dataclass
class SourceYield:
    """What became of one source: documents read, kept on each side, bytes kept, and dropped by reason."""

    read: int = 0
    kept: dict[str, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    kept_bytes: dict[str, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    cut: int = 0  # further documents that came of cutting long ones
    dropped: Counter[str] = field(default_factory=Counter)
    licences: set[str] = field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "cut": self.cut,
            "kept": dict(self.kept),
            "kept_bytes": dict(self.kept_bytes),
            "dropped": dict(sorted(self.dropped.items())),
            "licences": sorted(self.licences),
        }


class Sieve:
    """Runs the filters over many sources in turn and remembers what it has seen: one Sieve a corpus.

    `yields[source]` is the report. Keys of all kept documents stay in memory: 16 bytes each and Python's overhead.
    """

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        self.yields: dict[str, SourceYield] = {}
        self._seen: set[bytes] = set()

    def sift(self, source: str, examples: Iterable[Example]) -> Iterator[tuple[Split, Example]]:
        """(side, cleaned example) for every example of `source` that passes."""
        account = self.yields.setdefault(source, SourceYield())
        for example in examples:
            account.read += 1
            parts = self._clean(example)
            account.cut += len(parts) - 1
            for part in parts:
                text = example_text(part)
                verdict = self._verdict(part, text, account)
                if verdict in ("train", "validation"):
                    account.kept[verdict] += 1
                    account.kept_bytes[verdict] += len(text.encode())
                    account.licences.add(part.provenance.licence)
                    yield verdict, part  # type: ignore[misc]  # mypy does not narrow str to Literal by `in`
                else:
                    account.dropped[verdict] += 1

    def _clean(self, example: Example) -> list[Example]:
        """The example in NFC; a text longer than `max_chars` as several."""
        if isinstance(example, ChatExample):
            return [replace(example, conversation=_nfc_conversation(example.conversation))]
        text = _nfc(example.text)
        if len(text) <= self.config.max_chars:
            return [example if text is example.text else replace(example, text=text)]
        pieces = cut_prose(text, self.config.max_chars)
        return [
            TextExample(piece, replace(example.provenance, id=f"{example.provenance.id}#{number}"))
            for number, piece in enumerate(pieces)
        ]

    def _verdict(self, example: Example, text: str, account: SourceYield) -> str:
        """The side the example falls on, or why it is dropped."""
        is_chat = isinstance(example, ChatExample)
        for check in CHAT_FILTERS if is_chat else FILTERS:
            if reason := check(text, self.config):
                return reason
        if isinstance(example, ChatExample) and len(example.conversation.messages) < self.config.min_messages:
            return f"fewer than {self.config.min_messages} messages"
        key = document_key(text)
        if key in self._seen:
            return "duplicate"
        self._seen.add(key)
        where = side(key, self.config.validation_share)
        cap = self.config.validation_cap
        if where == "validation" and cap is not None and account.kept_bytes["validation"] >= cap:
            return "validation cap reached"
        return where


def _nfc(text: str) -> str:
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _nfc_conversation(conversation: Conversation) -> Conversation:
    if all(unicodedata.is_normalized("NFC", message.text) for message in conversation.messages):
        return conversation
    messages = (
        replace(message, parts=tuple(_nfc_part(part) for part in message.parts)) for message in conversation.messages
    )
    return replace(conversation, messages=tuple(messages))


def _nfc_part(part: TextPart | CallPart) -> TextPart | CallPart:
    if isinstance(part, CallPart):
        return replace(part, arguments=_nfc(part.arguments))
    return TextPart(_nfc(part.text))
