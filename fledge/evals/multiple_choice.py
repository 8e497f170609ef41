"""Multiple choice by log-likelihood: the answer is the choice that the model finds likeliest after the question.

With k shots, k solved examples from a disjoint set stand before the question (Brown et al. 2020, section 2.4 and
appendix G; there too the score normalised by length). Chance stands beside every score. The texts are put together
here, in plain text and not as a conversation, so that base and chat models read the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fledge.errors import DataError
from fledge.evals.bootstrap import bootstrap_mean
from fledge.evals.scorer import Scorer, TextEncoder
from fledge.types import Metrics

Floats = NDArray[np.float64]

SHOT_SEPARATOR = "\n\n"


class Question(Protocol):
    """A question with its choices; `answer` is the index of the right one, `context` a passage to read or empty."""

    @property
    def context(self) -> str: ...

    @property
    def question(self) -> str: ...

    @property
    def choices(self) -> tuple[str, ...]: ...

    @property
    def answer(self) -> int: ...


@dataclass(frozen=True)
class _Item:
    """One question as tokens: `sequences[c]` is read for choice c, scored from `first` on."""

    sequences: tuple[tuple[int, ...], ...]
    first: int
    is_truncated: bool


def evaluate(
    scorer: Scorer,
    questions: Sequence[Question],
    shots: Sequence[Question],
    tokenizer: TextEncoder,
    *,
    num_shots: int,
    seed: int,
    limit: int | None = None,
) -> Metrics:
    """Accuracy with `num_shots` solved examples drawn anew for every question from `shots`.

    `accuracy` (summed log-likelihood) and `accuracy_per_byte` (divided by the choice's UTF-8 bytes), each with `_low`
    and `_high` (95 %, bootstrap over questions); `chance` (expected accuracy of guessing), `questions`,
    `share_truncated` (contexts that lost tokens on the left because they exceed the model's row). Choices that tie for
    the best share the credit. `limit` takes a random subset, the same for a seed whatever `num_shots`; the examples
    for k shots are the first k of those for more. Raises `DataError` if there are too few examples or no questions.
    """
    chosen = _subset(questions, seed, limit)
    contexts = [_context(question, _draw(question, shots, num_shots, [seed, number])) for number, question in chosen]
    items = _tokenize(contexts, [question for _, question in chosen], tokenizer, scorer.row_length)
    totals = scorer.logprobs(
        [sequence for item in items for sequence in item.sequences],
        [item.first for item in items for _ in item.sequences],
    )
    sums = np.split([float(values.sum()) for values in totals], np.cumsum([len(q.choices) for _, q in chosen])[:-1])
    plain, per_byte = [], []
    for (_, question), sum_C in zip(chosen, sums, strict=True):
        bytes_C = np.asarray([max(1, len(choice.encode("utf-8"))) for choice in question.choices])
        plain.append(_credit(sum_C, question.answer))
        per_byte.append(_credit(sum_C / bytes_C, question.answer))
    return (
        bootstrap_mean(plain, seed=seed).metrics("accuracy")
        | bootstrap_mean(per_byte, seed=seed).metrics("accuracy_per_byte")
        | {
            "chance": float(np.mean([1 / len(question.choices) for _, question in chosen])),
            "questions": float(len(chosen)),
            "share_truncated": float(np.mean([item.is_truncated for item in items])),
        }
    )


def render(question: Question) -> str:
    """A question as the model reads it, up to where the answer begins (which opens with a space)."""
    asked = f"Question: {question.question.strip()}\nAnswer:"
    passage = question.context.strip()
    return f"{passage}\n{asked}" if passage else asked


def _context(question: Question, shots: Sequence[Question]) -> str:
    solved = [f"{render(shot)} {shot.choices[shot.answer]}" for shot in shots]
    return SHOT_SEPARATOR.join([*solved, render(question)])


def _subset(questions: Sequence[Question], seed: int, limit: int | None) -> list[tuple[int, Question]]:
    """(index, question) of all, or of `limit` drawn at random, in their own order."""
    if not questions or limit == 0:
        raise DataError("no questions to ask")
    order = np.random.default_rng(seed).permutation(len(questions))
    return [(int(index), questions[index]) for index in sorted(order[:limit])]


def _draw(question: Question, shots: Sequence[Question], num_shots: int, seed: list[int]) -> list[Question]:
    """`num_shots` examples in random order, none of which asks the same question."""
    if num_shots == 0:
        return []
    order = np.random.default_rng(seed).permutation(len(shots))
    others = (shots[index] for index in order if _key(shots[index]) != _key(question))
    drawn = list(islice(others, num_shots))
    if len(drawn) < num_shots:
        raise DataError(f"{num_shots} shots asked for, {len(drawn)} examples to draw from; ask for fewer")
    return drawn


def _key(question: Question) -> tuple[str, str]:
    return question.context, question.question


def _tokenize(
    contexts: Sequence[str],
    questions: Sequence[Question],
    tokenizer: TextEncoder,
    row_length: int | None,
) -> list[_Item]:
    texts = [f"{context} {choice}" for context, q in zip(contexts, questions, strict=True) for choice in q.choices]
    encoded, context_ids = tokenizer.encode_batch(texts), tokenizer.encode_batch(contexts)
    items, start = [], 0
    for ids, question in zip(context_ids, questions, strict=True):
        stop = start + len(question.choices)
        items.append(_item(ids, encoded[start:stop], tokenizer.end_of_text_id, row_length))
        start = stop
    return items


def _item(
    context_ids: Sequence[int], encoded: Sequence[Sequence[int]], end_of_text_id: int, row_length: int | None
) -> _Item:
    """The tokens of one question.

    A token may straddle the end of the context, and for one choice only. So what is scored starts where the encodings
    of the context and of ALL its continuations first differ: every choice is then charged for the same bytes before it.
    What exceeds the row is cut on the left, for all choices alike; the opening end-of-text token stays.
    """
    shared = min(_shared(context_ids, ids) for ids in encoded)
    longest = max(len(ids) for ids in encoded) - shared
    kept = shared if row_length is None else min(shared, max(0, row_length - longest))
    sequences = tuple((end_of_text_id, *ids[shared - kept :]) for ids in encoded)
    return _Item(sequences, 1 + kept, kept < shared)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two encodings share from the start."""
    for length, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return length
    return min(len(a), len(b))


def _credit(score_C: Floats, answer: int) -> float:
    """1 if the answer scores best, shared among those that tie with it, 0 otherwise."""
    best = np.flatnonzero(score_C == score_C.max())
    return 1 / len(best) if answer in best else 0.0
