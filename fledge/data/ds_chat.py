"""DeepSpeed-Chat: `{"prompt", "chosen", "rejected"}`, the prompt a text that ends by opening the assistant's turn.

Two dialects: `Human: a question Assistant:` on one line, and the paragraphs of HH-RLHF for several turns. Answers begin
with a blank. Source: the data README of DeepSpeed-Chat.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fledge.data.feedback import FeedbackExample, cannot_write
from fledge.data.hh_rlhf import dialogue, read_dialogue, split_dialogue
from fledge.data.records import BadRow, Intake, Row, each
from fledge.types import Conversation, PairExample

_ONE_LINE = re.compile(r"\A\s*Human:(.*\S)\s+Assistant:\s*\Z", re.DOTALL)


def recognises(record: Mapping[str, Any]) -> bool:
    prompt = record.get("prompt")
    is_open = isinstance(prompt, str) and prompt.rstrip().endswith("Assistant:") and "Human:" in prompt
    return is_open and {"chosen", "rejected"} <= set(record)


def read(rows: Iterable[Row], intake: Intake) -> Iterator[FeedbackExample]:
    """A pair a row."""
    yield from each(rows, intake, lambda row: [_pair(row, intake)])


def write(examples: Iterable[FeedbackExample]) -> Iterator[dict[str, Any]]:
    """Rows in the paragraph dialect; `DataError` for what is no pair of answers to user and assistant in turns."""
    for example in examples:
        if not isinstance(example, PairExample):
            raise cannot_write(example, "ds-chat")
        prompt = f"{dialogue(example, 'ds-chat')}\n\nAssistant:"
        yield {"prompt": prompt, "chosen": f" {example.chosen}", "rejected": f" {example.rejected}"}


def _pair(row: Row, intake: Intake) -> PairExample:
    chosen, rejected = (row.text(key).strip() for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadRow("identical answers", row.where, "chosen and rejected are the same text; drop the row")
    return PairExample(_prompt(row), chosen, rejected, row.provenance(intake))


def _prompt(row: Row) -> Conversation:
    text = row.text("prompt")
    one_line = _ONE_LINE.match(text)
    if one_line and "\n\nHuman:" not in one_line[1] and "\n\nAssistant:" not in one_line[1]:
        return Conversation.of(("user", row.checked(one_line[1].strip(), "prompt")))
    turns = split_dialogue(text, row, "prompt")
    if turns[-1] != ("assistant", ""):
        detail = 'expected a prompt that ends with "Assistant:"; mend or drop the row'
        raise BadRow("not a dialogue", f"{row.where}, prompt", detail)
    return read_dialogue(turns[:-1], row, "prompt")
