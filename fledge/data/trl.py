"""The types of TRL and Hugging Face, one JSON object or Parquet row each: fledge's canonical format.

| type | keys |
|---|---|
| language modelling | `messages`, or `text` |
| prompt-only | `prompt` |
| prompt-completion | `prompt`, `completion`; only the completion is learned |
| preference | `chosen`, `rejected` and, unless both repeat it, `prompt` |
| unpaired | `prompt`, `completion`, `label` |
| stepwise | `prompt`, `completions`, `labels` |

Prompts and answers are lists of messages or texts. Further columns: `tools`, `margin`, `score_chosen`,
`score_rejected`; and ours: `probability` and `shown_first`, and the origin as `source`, `id`, `licence`.
Source: the dataset formats page of TRL's documentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import takewhile
from typing import Any

from fledge.data.feedback import (
    FeedbackExample,
    cannot_write,
    judgement_record,
    probability_record,
    read_judgement,
    read_probability,
)
from fledge.data.messages import (
    one_answer,
    read_tools,
    read_turns,
    require_answer,
    require_prompt,
    write_messages,
    write_tools,
)
from fledge.data.records import BadRow, Intake, Row, each
from fledge.types import (
    ChatExample,
    Conversation,
    Message,
    PairExample,
    PromptExample,
    Provenance,
    StepsExample,
    TextExample,
    UnpairedExample,
)

_PREFERENCE, _STEPWISE = {"chosen", "rejected"}, {"prompt", "completions", "labels"}


def recognises(record: Mapping[str, Any]) -> bool:
    """Whether a record has the keys of one of the types."""
    keys = {key for key, value in record.items() if value is not None}
    return bool(keys & {"messages", "text"}) or any(keys >= wanted for wanted in (_PREFERENCE, _STEPWISE, {"prompt"}))


def read(rows: Iterable[Row], intake: Intake) -> Iterator[FeedbackExample]:
    """An example a row, of the type its keys say."""
    yield from each(rows, intake, lambda row: [_example(row, row.provenance(intake))])


def write(examples: Iterable[FeedbackExample]) -> Iterator[dict[str, Any]]:
    """Records that `read` reads as the same examples; `DataError` for rankings and ratings (see labels.py)."""
    for example in examples:
        origin = example.provenance
        yield {**_record(example), "source": origin.source, "id": origin.id, "licence": origin.licence}


def _example(row: Row, origin: Provenance) -> FeedbackExample:
    if row.has("chosen") or row.has("rejected"):
        return _pair(row, origin)
    if row.has("messages"):
        messages = read_turns(row, "messages", "user")
        require_answer(messages, row.where)
        return ChatExample(Conversation(messages, read_tools(row)), origin)
    if row.has("prompt", "completions"):
        return _steps(row, origin)
    if row.has("prompt", "completion"):
        return _unpaired(row, origin) if row.has("label") else _completed(row, origin)
    if row.has("prompt"):
        return PromptExample(_prompt(row), origin)
    if row.has("text"):
        return TextExample(row.text("text"), origin)
    expected = "messages, text, prompt, prompt and completion, or chosen and rejected"
    known = ", ".join(key for key in row.record if row.has(key)) or "none"
    raise BadRow(
        "missing key", row.where, f"its keys with a value are {known}, expected {expected}; rename them or drop the row"
    )


def _prompt(row: Row) -> Conversation:
    messages = read_turns(row, "prompt", "user")
    require_prompt(messages, f"{row.where}, prompt")
    return Conversation(messages, read_tools(row))


def _completed(row: Row, origin: Provenance) -> ChatExample:
    prompt = _prompt(row)
    completion = read_turns(row, "completion", "assistant")
    require_answer(completion, f"{row.where}, completion")
    context = tuple(replace(message, is_learned=False) for message in prompt.messages)
    return ChatExample(replace(prompt, messages=(*context, *completion)), origin)


def _unpaired(row: Row, origin: Provenance) -> UnpairedExample:
    answer = one_answer(read_turns(row, "completion", "assistant"), f"{row.where}, completion")
    return UnpairedExample(
        _prompt(row), answer, row.flag("label"), origin, read_probability(row), read_judgement(row, default=None)
    )


def _steps(row: Row, origin: Provenance) -> StepsExample:
    steps = [row.checked(text, f"completions[{n}]") for n, text in enumerate(row.items("completions"))]
    labels = [row.flag_of(label, f"labels[{n}]") for n, label in enumerate(row.items("labels"))]
    if not steps or len(steps) != len(labels):
        detail = f"{len(steps)} steps and {len(labels)} labels, expected one a step; mend or drop the row"
        raise BadRow("lengths differ", row.where, detail)
    return StepsExample(_prompt(row), tuple(steps), tuple(labels), origin)


def _pair(row: Row, origin: Provenance) -> PairExample:
    row.value("chosen"), row.value("rejected")
    prompt, chosen, rejected = _explicit(row) if _is_explicit(row) else _implicit(row)
    if chosen == rejected:
        raise BadRow("identical answers", row.where, "chosen and rejected are the same text; drop the row")
    scores = [row.optional_number(key) for key in ("score_chosen", "score_rejected")]
    shown_first = row.optional_text("shown_first")
    if shown_first not in (None, "chosen", "rejected"):
        raise BadRow("wrong type", f"{row.where}, shown_first", "expected chosen or rejected; mend or drop the row")
    return PairExample(
        prompt,
        chosen,
        rejected,
        origin,
        read_probability(row),
        row.optional_number("margin"),
        (scores[0], scores[1]) if scores[0] is not None and scores[1] is not None else None,
        read_judgement(row, default=None),
        shown_first,  # type: ignore[arg-type]  # mypy does not narrow str to Literal by `in`
    )


def _is_explicit(row: Row) -> bool:
    """A prompt beside answers that repeat it (as a list that begins before the assistant) counts as implicit."""
    chosen = row.value("chosen")
    first = chosen[0] if isinstance(chosen, list) and chosen else None
    return row.has("prompt") and not (isinstance(first, Mapping) and first.get("role") != "assistant")


def _explicit(row: Row) -> tuple[Conversation, str, str]:
    answers = (one_answer(read_turns(row, key, "assistant"), f"{row.where}, {key}") for key in ("chosen", "rejected"))
    return (_prompt(row), *answers)  # type: ignore[return-value]  # mypy loses the generator's length


def _implicit(row: Row) -> tuple[Conversation, str, str]:
    """The prompt is what both begin with: messages, or text up to the last blank that they share."""
    if isinstance(row.value("chosen"), str) and isinstance(row.value("rejected"), str):
        return _implicit_text(row)
    chosen, rejected = (read_turns(row, key, "assistant") for key in ("chosen", "rejected"))
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    prompt: tuple[Message, ...] = chosen[:shared]
    require_prompt(prompt, f"{row.where}, what chosen and rejected have in common")
    answers = (one_answer(m[shared:], f"{row.where}, {k}") for m, k in ((chosen, "chosen"), (rejected, "rejected")))
    return (Conversation(prompt, read_tools(row)), *answers)  # type: ignore[return-value]


def _implicit_text(row: Row) -> tuple[Conversation, str, str]:
    chosen, rejected = row.text("chosen"), row.text("rejected")
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    cut = max((n + 1 for n, letter in enumerate(chosen[:shared]) if letter.isspace()), default=0)
    if not chosen[:cut].strip():
        detail = "no prompt, and chosen and rejected begin with no common words; add the prompt or drop the row"
        raise BadRow("missing key", row.where, detail)
    answers = [row.checked(text[cut:], key) for text, key in ((chosen, "chosen"), (rejected, "rejected"))]
    return Conversation((Message.of("user", chosen[:cut].rstrip()),)), answers[0], answers[1]


def _record(example: FeedbackExample) -> dict[str, Any]:
    if isinstance(example, TextExample):
        return {"text": example.text}
    if isinstance(example, ChatExample):
        return _chat_record(example)
    if isinstance(example, PairExample):
        return _pair_record(example)
    if isinstance(example, UnpairedExample):
        answer = {"completion": write_messages([Message.of("assistant", example.completion)])}
        label = {"label": example.is_desirable} | probability_record(example.probability)
        return _prompt_record(example.prompt) | answer | label | judgement_record(example.judgement)
    if isinstance(example, StepsExample):
        steps = {"completions": list(example.steps), "labels": list(example.is_right)}
        return _prompt_record(example.prompt) | steps
    if isinstance(example, PromptExample) and not (example.answer or example.task or example.extra):
        return _prompt_record(example.prompt)
    raise cannot_write(example, "trl")


def _prompt_record(prompt: Conversation) -> dict[str, Any]:
    return {"prompt": write_messages(prompt.messages), **write_tools(prompt)}


def _chat_record(example: ChatExample) -> dict[str, Any]:
    """`messages` where everything is learned; `prompt` and `completion` where the first part is context."""
    messages = example.conversation.messages
    unlearned = [n for n, message in enumerate(messages) if not message.is_learned]
    if not unlearned:
        return {"messages": write_messages(messages), **write_tools(example.conversation)}
    cut = unlearned[-1] + 1
    is_split = all(not m.is_learned or m.role != "assistant" for m in messages[:cut])
    if not is_split or messages[cut - 1].role == "assistant":
        raise cannot_write(example, "trl", "it mixes messages that are learned with ones that are not")
    parts = {"prompt": write_messages(messages[:cut]), "completion": write_messages(messages[cut:])}
    return {**parts, **write_tools(example.conversation)}


def _pair_record(example: PairExample) -> dict[str, Any]:
    record = _prompt_record(example.prompt)
    for key, text in (("chosen", example.chosen), ("rejected", example.rejected)):
        record[key] = write_messages([Message.of("assistant", text)])
    scores = example.scores or (None, None)
    optional = {
        "margin": example.margin,
        "score_chosen": scores[0],
        "score_rejected": scores[1],
        "shown_first": example.shown_first,
    }
    record |= {key: value for key, value in optional.items() if value is not None}
    return record | probability_record(example.probability) | judgement_record(example.judgement)
