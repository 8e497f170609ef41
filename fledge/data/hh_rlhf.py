"""HH-RLHF: `{"chosen", "rejected"}`, each a dialogue as one text of paragraphs that begin "Human:" or "Assistant:".

The two agree up to the last "Assistant:", which opens the answers. Source: Bai et al. 2022 (2204.05862) and its data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fledge.data.feedback import FeedbackExample, cannot_write
from fledge.data.messages import require_prompt
from fledge.data.records import BadRow, Intake, Row, each
from fledge.types import Conversation, Message, PairExample, Role

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_NAMES = {role: name for name, role in _ROLES.items()}


def recognises(record: Mapping[str, Any]) -> bool:
    texts = [record.get(key) for key in ("chosen", "rejected")]
    return "prompt" not in record and all(isinstance(t, str) and t.startswith("\n\nHuman:") for t in texts)


def read(rows: Iterable[Row], intake: Intake) -> Iterator[FeedbackExample]:
    """A pair a row."""
    yield from each(rows, intake, lambda row: [_pair(row, intake)])


def write(examples: Iterable[FeedbackExample]) -> Iterator[dict[str, Any]]:
    """Rows of two dialogues; `DataError` for what is no pair of answers to user and assistant in turns."""
    for example in examples:
        if not isinstance(example, PairExample):
            raise cannot_write(example, "hh-rlhf")
        prompt = dialogue(example, "hh-rlhf")
        yield {key: f"{prompt}\n\nAssistant: {getattr(example, key)}" for key in ("chosen", "rejected")}


def split_dialogue(text: str, row: Row, key: str) -> list[tuple[Role, str]]:
    """(role, text) of every paragraph that names its speaker, without white space around it, from the first to the
    last, which may be empty."""
    turns = list(_TURN.finditer(text))
    if not turns or text[: turns[0].start()].strip():
        detail = 'expected paragraphs beginning with "Human:" and "Assistant:"; mend or drop the row'
        raise BadRow("not a dialogue", f"{row.where}, {key}", detail)
    ends = [*(turn.start() for turn in turns[1:]), len(text)]
    return [(_ROLES[turn[1]], text[turn.end() : end].strip()) for turn, end in zip(turns, ends, strict=True)]


def read_dialogue(turns: Sequence[tuple[Role, str]], row: Row, key: str) -> Conversation:
    """The turns as a prompt."""
    conversation = Conversation(tuple(Message.of(role, row.checked(text, key)) for role, text in turns))
    require_prompt(conversation.messages, f"{row.where}, {key}")
    return conversation


def dialogue(example: PairExample, name: str) -> str:
    """The prompt as paragraphs; `DataError` if it holds more than users and assistants."""
    messages = example.prompt.messages
    if example.prompt.tools or not {message.role for message in messages} <= set(_NAMES):
        raise cannot_write(example, name, "it has tools or messages of the system or a tool")
    return "".join(f"\n\n{_NAMES[message.role]}: {message.text}" for message in messages)


def _pair(row: Row, intake: Intake) -> PairExample:
    chosen, rejected = (split_dialogue(row.text(key), row, key) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1] or chosen[-1][0] != "assistant" or rejected[-1][0] != "assistant":
        detail = "chosen and rejected differ before their last answer; mend or drop the row"
        raise BadRow("no common prompt", row.where, detail)
    prompt = read_dialogue(chosen[:-1], row, "chosen")
    answers = [row.checked(turns[-1][1], key) for turns, key in ((chosen, "chosen"), (rejected, "rejected"))]
    if answers[0] == answers[1]:
        raise BadRow("identical answers", row.where, "chosen and rejected are the same text; drop the row")
    return PairExample(prompt, answers[0], answers[1], row.provenance(intake))
