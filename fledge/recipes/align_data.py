"""The data of an alignment run as tokens: converters from examples, and what the stage `data` left (align_reading.py).

That stage leaves the examples of both sides as JSON lines; `tokens_of` makes of them what a method learns from.

An answer's tokens are what the chat template puts after the prompt, up to and with the end of the turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from fledge.config import from_json
from fledge.data.feedback import FeedbackExample, prompt_of
from fledge.errors import DataError
from fledge.objectives.preference import PreferenceIds
from fledge.objectives.ranking import PairLabel, RankedIds
from fledge.recipes.align_models import Context
from fledge.recipes.align_plan import AlignPlan
from fledge.text.chat import Renderer, normalise
from fledge.text.prefixed import PrefixedRenderer
from fledge.types import (
    ChatExample,
    Conversation,
    PairExample,
    Piece,
    PromptExample,
    Ranking,
    RatedExample,
    StepsExample,
    TextExample,
    UnpairedExample,
)

Ids = tuple[int, ...]
Verdict = tuple[Ids, Ids, bool]
TRAIN, HELD_OUT = "train", "held_out"
SAFETY_TRAIN, SAFETY_HELD_OUT = "safety_train", "safety_held_out"
_IN_WORDS: Mapping[type, str] = {
    TextExample: "a text",
    ChatExample: "a conversation",
    PairExample: "a pair",
    UnpairedExample: "an answer with a verdict",
    Ranking: "a ranking",
    RatedExample: "an answer with a rating",
    PromptExample: "a prompt without answers",
    StepsExample: "an answer in judged steps",
}
_KINDS = {kind.__name__: kind for kind in _IN_WORDS}


@dataclass(frozen=True)
class Asking:
    """A prompt to answer: as a conversation, as tokens, and what a verifier is told about it."""

    conversation: Conversation
    ids: Ids
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Cut:
    """How examples become tokens: the renderer, and the most tokens of prompt, of answer, and of both together."""

    renderer: Renderer
    max_length: int
    prompt_length: int | None = None
    response_length: int | None = None


# Converters: (example, cut) -> what a method learns from; DataError says why an example cannot be used.


def answer_ids(cut: Cut, prompt: Conversation, text: str, *, ended: bool = True) -> tuple[Ids, Ids]:
    """(prompt, answer) as tokens; `DataError` if they are too long together or the answer is empty."""
    prompt = without_learning(prompt)
    opened = tuple(cut.renderer.prompt(prompt))
    rendered = cut.renderer.render(prompt.then("assistant", text), ended=ended)
    end = len(rendered.ids)
    while end > len(opened) and not rendered.loss_mask[end - 1]:
        end -= 1  # a template may put a line break after the end of a turn, which nobody says
    answer = rendered.ids[len(opened) : end]
    if not answer:
        raise DataError("empty answer: it has no tokens; fill it in or drop the row")
    _require_length(len(opened) + len(answer), cut.max_length, "prompt and answer")
    return opened, answer


def without_learning(prompt: Conversation) -> Conversation:
    """A prompt with nothing in it to learn: earlier answers are context."""
    return replace(prompt, messages=tuple(replace(message, is_learned=False) for message in prompt.messages))


def preferences(example: FeedbackExample, cut: Cut) -> list[PreferenceIds]:
    """The pair, or all pairs of a ranking that are no ties, each with the same share of one prompt's weight."""
    if isinstance(example, PairExample):
        prompt, chosen = answer_ids(cut, example.prompt, example.chosen)
        _, rejected = answer_ids(cut, example.prompt, example.rejected)
        return [PreferenceIds(prompt, chosen, rejected, example.probability)]
    if not isinstance(example, Ranking):
        raise _wrong_kind(example, "pairs or rankings")
    answers = _answers(example, cut)
    pairs = [
        (i, j) if example.ranks[i] < example.ranks[j] else (j, i)
        for i, j in combinations(range(len(answers)), 2)
        if example.ranks[i] != example.ranks[j] and answers[i] != answers[j]
    ]
    if not pairs:
        raise DataError("all ties: no two answers differ in rank; drop the row")
    return [PreferenceIds(answers[i][0], answers[i][1], answers[j][1], weight=1 / len(pairs)) for i, j in pairs]


def verdicts(example: FeedbackExample, cut: Cut) -> list[Verdict]:
    """(prompt, answer, is it desirable); a pair is two verdicts (Ethayarajh et al. 2024, section 4.2)."""
    if isinstance(example, UnpairedExample):
        prompt, answer = answer_ids(cut, example.prompt, example.completion)
        return [(prompt, answer, example.is_desirable)]
    if isinstance(example, PairExample):
        pair = preferences(example, cut)[0]
        return [(pair.prompt, pair.first, True), (pair.prompt, pair.second, False)]
    raise _wrong_kind(example, "answers with a label (prompt, completion, label), or pairs")


def rankings(example: FeedbackExample, cut: Cut) -> list[RankedIds]:
    """A ranking of K answers; a pair is one of two, with its soft label and margin if it has them."""
    if isinstance(example, PairExample):
        pair = preferences(example, cut)[0]
        is_plain = pair.preference == 1.0 and example.margin is None
        labels = () if is_plain else (PairLabel(0, 1, pair.preference, example.margin or 0.0),)
        return [RankedIds(pair.prompt, (pair.first, pair.second), (1, 2), labels)]
    if not isinstance(example, Ranking):
        raise _wrong_kind(example, "rankings or pairs")
    answers = _answers(example, cut)
    best_of: dict[Ids, int] = {}
    for (_, answer), rank in zip(answers, example.ranks, strict=True):
        best_of[answer] = min(rank, best_of.get(answer, rank))  # the same answer twice ties with itself
    ranks = tuple(best_of[answer] for _, answer in answers)
    if len(set(ranks)) < 2:
        raise DataError("all ties: no two answers differ in rank; drop the row")
    return [RankedIds(answers[0][0], tuple(answer for _, answer in answers), ranks)]


def pieces(example: FeedbackExample, cut: Cut) -> list[Piece]:
    """A conversation, its oldest exchanges left out if all do not fit; or a text, cut at the row's end."""
    if isinstance(example, TextExample):
        tokenizer = cut.renderer.tokenizer
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(example.text), tokenizer.end_of_text_id]
        return [_piece(ids[start : start + cut.max_length + 1]) for start in range(0, len(ids) - 1, cut.max_length)]
    if not isinstance(example, ChatExample):
        raise _wrong_kind(example, "conversations (messages, or instruction and output) or texts")
    messages = normalise(example.conversation).messages
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]
    head = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    for start in (head, *(i for i in range(head + 1, len(messages)) if messages[i].role == "user")):
        conversation = replace(example.conversation, messages=(*messages[:head], *messages[start:]))
        rendered = cut.renderer.render(conversation)
        if len(rendered.ids) <= cut.max_length + 1:
            if not any(rendered.loss_mask[1:]):
                raise DataError("nothing to learn: no message of the assistant's; drop the row")
            return [_piece(rendered.ids, rendered.loss_mask)]
    raise DataError(f"too long: its last exchange alone has more than {cut.max_length} tokens; shorten or drop it")


def askings(example: FeedbackExample, cut: Cut) -> list[Asking]:
    """The prompt of any example, with the answer and the further facts of one that has them."""
    if isinstance(example, TextExample):
        raise _wrong_kind(example, "prompts, or answers with their prompts")
    prompt = without_learning(prompt_of(example))
    if not prompt.messages:
        raise DataError("no prompt: it begins with the assistant's message; drop the row")
    ids = tuple(cut.renderer.prompt(prompt))
    _require_length(len(ids), cut.prompt_length or cut.max_length, "the prompt")
    record: dict[str, Any] = {}
    if isinstance(example, PromptExample):
        record = {**example.extra, "answer": example.answer, "task": example.task}
    return [Asking(prompt, ids, {key: value for key, value in record.items() if value is not None})]


def demonstration(example: FeedbackExample, cut: Cut) -> tuple[Ids, Ids] | None:
    """(prompt, answer) that FeedME may imitate: the first answer of a conversation, or one that people have rated."""
    if isinstance(example, RatedExample):
        return answer_ids(cut, example.prompt, example.completion)
    if not isinstance(example, ChatExample):
        return None
    messages = example.conversation.messages
    place = next(i for i, message in enumerate(messages) if message.role == "assistant")
    return answer_ids(cut, replace(example.conversation, messages=messages[:place]), messages[place].text)


def askings_and_shown(example: FeedbackExample, cut: Cut) -> list[Asking]:
    """As `askings`; `DataError` as well for an answer that could not be imitated."""
    found = askings(example, cut)
    demonstration(example, cut)
    return found


Converter = Callable[[FeedbackExample, Cut], Sequence[Any]]
CONVERTERS: Mapping[str, Converter] = {
    "sft": pieces,
    "reward": rankings,
    "dpo": preferences,
    "ipo": preferences,
    "kto": verdicts,
    "ppo": askings,
    "grpo": askings,
    "rloo": askings,
    "best-of-n": askings,
    "feedme": askings_and_shown,
}


def _answers(example: Ranking, cut: Cut) -> list[tuple[Ids, Ids]]:
    texts = zip(example.completions, example.ended, strict=True)
    return [answer_ids(cut, example.prompt, text, ended=ended) for text, ended in texts]


def _piece(ids: Sequence[int], mask: Sequence[bool] | None = None) -> Piece:
    weights = np.ones(len(ids), np.float32) if mask is None else np.array(mask, dtype=np.float32)
    return Piece(np.array(ids, dtype=np.int32), weights)


def _require_length(found: int, limit: int, what: str) -> None:
    if found > limit:
        raise DataError(f"too long: {what} has {found} tokens, at most {limit} are taken; shorten or drop the row")


def _wrong_kind(example: FeedbackExample, wanted: str) -> DataError:
    return DataError(
        f"wrong kind: it is {_IN_WORDS[type(example)]}, this method learns from {wanted}; use another file"
    )


# What the stage `data` left.


def mixes_texts(plan: AlignPlan) -> bool:
    """Whether texts among the data are rows of pretraining beside the episodes."""
    return getattr(plan.train, "pretrain_weight", 0.0) > 0


def cut_of(context: Context, renderer: Renderer) -> Cut:
    """Lengths as the method's settings say."""
    settings = context.plan.train
    prompt, answer = getattr(settings, "prompt_length", None), getattr(settings, "response_length", None)
    longest = prompt + answer if prompt is not None and answer is not None else settings.fit.max_length
    # A soft prompt takes its room from every row; a renderer that puts it in front counts it itself.
    taken = 0 if isinstance(renderer, PrefixedRenderer) else context.plan.soft_prompt or 0
    return Cut(renderer, longest - taken, prompt, answer)


def examples_of(context: Context, side: str) -> list[FeedbackExample]:
    """The examples of a side ("train", "held_out"), as the stage `data` left them."""
    with (context.run / "data" / f"{side}.jsonl").open(encoding="utf-8", newline="\n") as lines:
        records = [json.loads(line) for line in lines]
    found: list[Any] = [from_json(_KINDS[record["kind"]], record["example"]) for record in records]
    return found


def tokens_of(context: Context, side: str, cut: Cut) -> list[Any]:
    """What the run's method learns from, of one side."""
    convert = CONVERTERS[context.plan.method]
    return [found for example in examples_of(context, side) for found in convert(example, cut)]


def askings_of(context: Context, side: str, cut: Cut) -> list[Asking]:
    """The prompts of one side, each once; those too long for the cut and plain texts are left out."""
    unique: dict[Ids, Asking] = {}
    for example in examples_of(context, side):
        try:
            for asking in askings(example, cut):
                unique.setdefault(asking.ids, asking)
        except DataError:
            continue
    return list(unique.values())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that were written whole; none if there is no file."""
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
