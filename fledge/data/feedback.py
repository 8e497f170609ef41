"""What the formats of alignment data have in common: the examples they speak of, and who judged them.

A judgement is written flat beside the answers: `kind` ("human", "ai" or "rule"), `labeler`, `confidence`, `batch`,
`policy_version`, `grounds`, `rationale`; `probability` says how sure a soft label is.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args

from fledge.data.records import BadRow, Row, kind_of
from fledge.errors import DataError
from fledge.types import (
    ChatExample,
    Conversation,
    Judgement,
    PairExample,
    PromptExample,
    Ranking,
    RatedExample,
    StepsExample,
    TextExample,
    UnpairedExample,
)

FeedbackExample = (
    TextExample | ChatExample | PairExample | UnpairedExample | Ranking | RatedExample | PromptExample | StepsExample
)
Kind = Literal["human", "ai", "rule"]
_KEYS = tuple(field.name for field in fields(Judgement))
_WORDS = {
    TextExample: "a text",
    ChatExample: "a conversation",
    PairExample: "a pair",
    UnpairedExample: "a labelled answer",
    Ranking: "a ranking",
    RatedExample: "a rated answer",
    PromptExample: "a prompt",
    StepsExample: "an answer in steps",
}


def read_judgement(row: Row, *, default: Kind | None) -> Judgement | None:
    """Who judged, from the keys of the row; without any of them a judgement of kind `default`, or None."""
    if not any(row.has(key) for key in _KEYS):
        return None if default is None else Judgement(default)
    kind = row.record.get("kind") or default or "human"
    if kind not in get_args(Kind):
        expected = ", ".join(get_args(Kind))
        raise BadRow("wrong type", f"{row.where}, kind", f"{kind_of(kind)}, expected one of {expected}; mend it")
    texts = {key: _name(row, key) for key in _KEYS if key not in ("kind", "confidence")}
    return Judgement(kind=kind, confidence=row.optional_number("confidence"), **texts)


def judgement_record(judgement: Judgement | None) -> dict[str, Any]:
    """The keys that `read_judgement` reads."""
    if judgement is None:
        return {}
    return {key: value for key in _KEYS if (value := getattr(judgement, key)) is not None}


def read_probability(row: Row) -> float:
    """`probability` of the row, 1 where it has none."""
    value = row.optional_number("probability")
    if value is not None and not 0 <= value <= 1:
        raise BadRow("wrong type", f"{row.where}, probability", f"{value:g}, expected 0 to 1; mend or drop the row")
    return 1.0 if value is None else value


def probability_record(probability: float) -> dict[str, Any]:
    """The key that `read_probability` reads, where there is something to say."""
    return {} if probability == 1.0 else {"probability": probability}


def prompt_of(example: FeedbackExample) -> Conversation:
    """What an example answers: its prompt; a conversation up to the assistant's first message; a text, as is."""
    if isinstance(example, TextExample):
        return Conversation.of(("user", example.text))
    if isinstance(example, ChatExample):
        messages = example.conversation.messages
        end = next((n for n, message in enumerate(messages) if message.role == "assistant"), len(messages))
        return Conversation(messages[:end])
    return example.prompt


def answers_of(example: FeedbackExample) -> tuple[str, ...]:
    """The answers an example holds, in its order."""
    if isinstance(example, PairExample):
        return example.chosen, example.rejected
    if isinstance(example, Ranking):
        return example.completions
    if isinstance(example, StepsExample):
        return ("\n".join(example.steps),)
    if isinstance(example, UnpairedExample | RatedExample):
        return (example.completion,)
    if isinstance(example, ChatExample):
        return tuple(message.text for message in example.conversation.messages if message.role == "assistant")
    return ()


def cannot_write(example: FeedbackExample, name: str, why: str = "it has no place for one") -> DataError:
    """The refusal of a writer whose format cannot hold an example."""
    origin = example.provenance
    return DataError(
        f"{_WORDS[type(example)]} ({origin.source}, {origin.id}) cannot be written as {name}: {why}; "
        f"choose the format trl, or labels for rankings and ratings"
    )


def _name(row: Row, key: str) -> str | None:
    """A name, which may be a number in the file."""
    value = row.record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return row.optional_text(key)
