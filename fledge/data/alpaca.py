"""Alpaca: `{instruction, input, output}`, and what LLaMA-Factory added: `system`, `history` (pairs of earlier turns),
`chosen` and `rejected` instead of `output`, `kto_tag` beside it, `tools`.

Sources: Taori et al. 2023 (Stanford Alpaca); the data README of LLaMA-Factory, which joins instruction and input by a
line break, as is done here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fledge.data.feedback import FeedbackExample, cannot_write
from fledge.data.messages import read_tools, write_tools
from fledge.data.records import BadRow, Intake, Row, each
from fledge.types import ChatExample, Conversation, Message, PairExample, UnpairedExample


@dataclass(frozen=True)
class Columns:
    """What the keys are called; the names of the fields are those of LLaMA-Factory's dataset_info.json."""

    prompt: str = "instruction"
    query: str = "input"
    response: str = "output"
    history: str = "history"
    system: str = "system"
    tools: str = "tools"
    chosen: str = "chosen"
    rejected: str = "rejected"
    kto_tag: str = "kto_tag"


DEFAULT = Columns()


def recognises(record: Mapping[str, Any]) -> bool:
    answer = record.get("output") is not None or (record.get("chosen") is not None and "rejected" in record)
    return isinstance(record.get("instruction"), str) and answer


def read(rows: Iterable[Row], intake: Intake, columns: Columns = DEFAULT) -> Iterator[FeedbackExample]:
    """An example a row: a pair where there is a chosen answer, a labelled answer where there is a tag, else a chat."""
    yield from each(rows, intake, lambda row: [_example(row, intake, columns)])


def write(examples: Iterable[FeedbackExample]) -> Iterator[dict[str, Any]]:
    """Rows with an empty `input`; `DataError` for what is no exchange of user and assistant."""
    for example in examples:
        if isinstance(example, ChatExample):
            *messages, last = example.conversation.messages or (Message.of("user", ""),)
            if last.role != "assistant" or not all(message.is_learned for message in example.conversation.messages):
                raise cannot_write(example, "alpaca", "it must end with an answer and be learned whole")
            prompt = Conversation(tuple(messages), example.conversation.tools)
            yield {**_prompt_record(example, prompt), "output": last.text}
        elif isinstance(example, PairExample):
            yield {**_prompt_record(example, example.prompt), "chosen": example.chosen, "rejected": example.rejected}
        elif isinstance(example, UnpairedExample):
            answer = {"output": example.completion, "kto_tag": example.is_desirable}
            yield {**_prompt_record(example, example.prompt), **answer}
        else:
            raise cannot_write(example, "alpaca")


def _example(row: Row, intake: Intake, columns: Columns) -> FeedbackExample:
    prompt, origin = _prompt(row, columns), row.provenance(intake)
    if row.has(columns.chosen) or row.has(columns.rejected):
        chosen, rejected = row.text(columns.chosen), row.text(columns.rejected)
        if chosen == rejected:
            raise BadRow("identical answers", row.where, "chosen and rejected are the same text; drop the row")
        return PairExample(prompt, chosen, rejected, origin)
    answer = row.text(columns.response)
    if row.has(columns.kto_tag):
        return UnpairedExample(prompt, answer, row.flag(columns.kto_tag), origin)
    return ChatExample(prompt.then("assistant", answer), origin)


def _prompt(row: Row, columns: Columns) -> Conversation:
    messages = []
    if system := row.text(columns.system, may_be_empty=True):
        messages.append(Message.of("system", system))
    for place, pair in enumerate(row.items(columns.history) if row.has(columns.history) else []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            where = f"{row.where}, {columns.history}[{place}]"
            raise BadRow("wrong type", where, "expected a pair of what was said and answered; mend or drop the row")
        said, answered = (row.checked(text, f"{columns.history}[{place}]") for text in pair)
        messages += [Message.of("user", said), Message.of("assistant", answered)]
    instruction, query = row.text(columns.prompt), row.text(columns.query, may_be_empty=True)
    messages.append(Message.of("user", f"{instruction}\n{query}" if query else instruction))
    return Conversation(tuple(messages), read_tools(row, columns.tools))


def _prompt_record(example: FeedbackExample, prompt: Conversation) -> dict[str, Any]:
    messages = list(prompt.messages)
    record: dict[str, Any] = {"system": messages.pop(0).text} if messages and messages[0].role == "system" else {}
    if [m.role for m in messages] != ["user", *["assistant", "user"] * (len(messages) // 2)]:
        raise cannot_write(example, "alpaca", "user and assistant do not take turns")
    texts = [message.text for message in messages]
    if len(texts) > 1:
        record["history"] = [[said, answered] for said, answered in zip(texts[:-1:2], texts[1:-1:2], strict=True)]
    return {"instruction": texts[-1], "input": "", **record, **write_tools(prompt)}
