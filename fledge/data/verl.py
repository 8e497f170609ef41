"""verl's rows for RL with verifiers, usually Parquet: `{"data_source", "prompt": [messages], "ability",
"reward_model": {"style", "ground_truth"}, "extra_info"}`.

`data_source` chooses the reward function and becomes the task; a ground truth that is no text becomes JSON text.
Source: the data preparation page of verl's documentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fledge.data.feedback import FeedbackExample, cannot_write
from fledge.data.messages import as_text, read_tools, read_turns, require_prompt, write_messages, write_tools
from fledge.data.records import Intake, Row, each
from fledge.types import Conversation, PromptExample


def recognises(record: Mapping[str, Any]) -> bool:
    return "prompt" in record and isinstance(record.get("reward_model"), Mapping)


def read(rows: Iterable[Row], intake: Intake) -> Iterator[FeedbackExample]:
    """A prompt a row."""
    yield from each(rows, intake, lambda row: [_prompt(row, intake)])


def write(examples: Iterable[FeedbackExample]) -> Iterator[dict[str, Any]]:
    """Rows; `DataError` for what is no prompt."""
    for example in examples:
        if not isinstance(example, PromptExample):
            raise cannot_write(example, "verl")
        extra = dict(example.extra)
        reward = {"style": extra.pop("style", "rule"), "ground_truth": example.answer}
        record: dict[str, Any] = {"data_source": example.task or example.provenance.source}
        record |= {"prompt": write_messages(example.prompt.messages), **write_tools(example.prompt)}
        record |= {"ability": extra.pop("ability", None), "reward_model": reward, "extra_info": extra}
        yield {key: value for key, value in record.items() if value not in (None, {})}


def _prompt(row: Row, intake: Intake) -> PromptExample:
    messages = read_turns(row, "prompt", "user")
    require_prompt(messages, f"{row.where}, prompt")
    reward = row.object("reward_model")
    truth = reward.record.get("ground_truth")
    if truth is not None and not isinstance(truth, str):
        truth = as_text(_without_nulls(truth))
    answer = None if truth is None else reward.checked(truth, "ground_truth")
    extra = dict(_without_nulls(row.object("extra_info").record)) if row.has("extra_info") else {}
    extra |= {"style": reward.optional_text("style") or "rule"}
    if row.has("ability"):
        extra["ability"] = row.text("ability")
    prompt = Conversation(messages, read_tools(row))
    return PromptExample(prompt, row.provenance(intake), answer, row.text("data_source"), extra)


def _without_nulls(value: Any) -> Any:
    """Parquet gives every row every key; those of other rows come back as null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value
