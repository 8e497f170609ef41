"""What an alignment run came to, measured on prompts it never trained on: the stage `outcome`.

The start and the result answer the same held-out prompts with the same seeds. KL(result || start) is estimated on the
result's own answers, which were drawn at temperature 1: the mean over answers of log pi(y|x) - log pi_start(y|x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fledge.data.feedback import FeedbackExample
from fledge.data.pack import PackedRows, PieceList
from fledge.evals import reward_accuracy, win_rate
from fledge.evals.bootstrap import bootstrap_mean
from fledge.formats.checkpoint import LoadedModel, load_model
from fledge.objectives.next_token import NextToken
from fledge.recipes.align_data import (
    HELD_OUT,
    SAFETY_HELD_OUT,
    Asking,
    Cut,
    answer_ids,
    askings_of,
    cut_of,
    examples_of,
    pieces,
)
from fledge.recipes.align_models import Context, scalar, start_of
from fledge.recipes.align_offline import known_pairs, known_verdicts, row_logprobs, rows_of
from fledge.recipes.align_plan import RewardPart
from fledge.recipes.align_rewards import part_scores
from fledge.recipes.align_settings import FitSettings
from fledge.recipes.answers import Asked, chat_answers, score_answers
from fledge.recipes.report import Answer, Cell, Fact, Interval, Sample, Table
from fledge.recipes.stage_reward import accuracy_table
from fledge.train.device import precision
from fledge.types import Completion, PairExample, Ranking

PREFERENCES = ("dpo", "ipo")
"""Methods whose held-out pairs have an implicit reward."""


@dataclass(frozen=True)
class Spoken:
    """What one model said to the held-out prompts."""

    stage: str
    completions: Sequence[Completion]

    @property
    def texts(self) -> list[str]:
        return [completion.text for completion in self.completions]


def outcome_stage(context: Context) -> None:
    """Held-out figures of the method, answers before and after, KL between them, and the judges' win rates."""
    start = start_of(context)
    directory = context.run / context.plan.method / "model"
    result = load_model(directory, device=context.device, with_soft_prompt=True)
    if context.plan.method == "reward":
        _report_reward(context, start, result)
        return
    facts = list(_held_out_facts(context, start, result))
    asked = _asked(context, start)
    tables: list[Table] = []
    samples: tuple[Sample, ...] = ()
    if asked:
        before, after = (_spoken(context, model, asked) for model in (start, result))
        facts += _speech_facts(context, (start, result), asked, after)
        tables = _win_tables(context, start, asked, (before, after))
        samples = _samples(context, asked, (before, after))
    context.report = replace(
        context.report,
        headline=facts[0] if facts else None,
        facts=tuple(facts),
        tables=(*context.report.tables, *tables),
        samples=samples,
    )


# What the method itself promises, on held-out data.


def _held_out_facts(context: Context, start: LoadedModel, result: LoadedModel) -> list[Fact]:
    if context.plan.method in PREFERENCES:
        return _pair_facts(context, start, result)
    if context.plan.method == "kto":
        return _verdict_facts(context, start, result)
    if context.plan.method == "sft":
        fit: FitSettings = context.plan.train.fit
        return [
            *_loss_facts(context, (start, result), HELD_OUT, "answers", fit),
            *_loss_facts(context, (start, result), SAFETY_HELD_OUT, "safety demonstrations", fit),
        ]
    return []


def _loss_facts(
    context: Context, models: tuple[LoadedModel, LoadedModel], side: str, what: str, fit: FitSettings
) -> list[Fact]:
    """Nats a learned token of a held-out side, after and before; nothing where the side is empty."""
    losses = []
    for loaded in models:
        cut = Cut(loaded.renderer, fit.max_length)
        found = [piece for example in examples_of(context, side) for piece in pieces(example, cut)]
        if not found:
            return []
        losses.append(next_token_loss(loaded, PackedRows(PieceList(found), fit.max_length, context.plan.seed), fit))
    return [
        Fact(f"held-out {what}, after", losses[1], "nats a token"),
        Fact(f"held-out {what}, before", losses[0], "nats a token"),
    ]


def _pair_facts(context: Context, start: LoadedModel, result: LoadedModel) -> list[Fact]:
    """Implicit reward accuracy: how often beta x log-ratio is higher for the answer that was preferred."""
    pairs = [pair for pair in known_pairs(context, HELD_OUT, start) if pair.preference != 0.5]
    if not pairs:
        return []
    now = row_logprobs(result, rows_of(context, pairs), context.plan.train.fit)
    margins = []
    for number, pair in enumerate(pairs):
        assert pair.reference is not None
        gap = (now[2 * number] - pair.reference[0]) - (now[2 * number + 1] - pair.reference[1])
        margins.append(gap if pair.preference > 0.5 else -gap)
    right_N = np.array([0.5 * (1 + np.sign(margin)) for margin in margins])
    found = bootstrap_mean(right_N, seed=context.plan.seed).metrics("accuracy")
    table = Table.of(
        "Held-out pairs put in the right order by the implicit reward",
        ("pairs", "right %"),
        [(str(len(pairs)), Interval(found["accuracy"], found["accuracy_low"], found["accuracy_high"], 0.5))],
    )
    context.report = replace(context.report, tables=(*context.report.tables, table))
    beta = context.plan.train.beta
    return [
        Fact("held-out pairs right", found["accuracy"], "%"),
        Fact("held-out margin", beta * float(np.mean(margins)), "implicit reward"),
        Fact("held-out pairs", len(pairs)),
    ]


def _verdict_facts(context: Context, start: LoadedModel, result: LoadedModel) -> list[Fact]:
    verdicts = known_verdicts(context, HELD_OUT, start)
    now = row_logprobs(result, [(v.prompt, v.completion) for v in verdicts], context.plan.train.fit)
    gains: dict[bool, list[float]] = {True: [], False: []}
    for verdict, logprob in zip(verdicts, now, strict=True):
        assert verdict.reference is not None
        gains[verdict.desirable].append(context.plan.train.beta * (logprob - verdict.reference[0]))
    means = {kind: float(np.mean(found)) if found else math.nan for kind, found in gains.items()}
    return [
        Fact("held-out reward, desirable minus not", means[True] - means[False], "implicit reward"),
        Fact("held-out reward, desirable", means[True], "implicit reward"),
        Fact("held-out reward, undesirable", means[False], "implicit reward"),
    ]


def next_token_loss(loaded: LoadedModel, rows: PackedRows, fit: FitSettings) -> float:
    """Nats a target over all rows of an epoch."""
    objective = NextToken(fit.max_length, loaded.tokenizer.pad_id)
    device = next(loaded.model.parameters()).device
    total, count = 0.0, 0.0
    for number in range(rows.num_rows(0)):
        batch = objective.collate([rows.row(number)]).to(device)
        with torch.no_grad(), precision(device):
            term = objective.loss(loaded.model, batch).terms["next_token"]  # type: ignore[arg-type]
        total, count = total + float(term.sum), count + term.count
    return total / max(count, 1.0)


# What is said before and after.


def _asked(context: Context, start: LoadedModel) -> list[Asking]:
    """Held-out prompts that leave room for an answer."""
    cut, plan = cut_of(context, start.renderer), context.plan.outcome
    room = cut.prompt_length or max(1, cut.max_length - plan.max_tokens)
    return askings_of(context, HELD_OUT, replace(cut, prompt_length=room))[: plan.prompts]


def _spoken(context: Context, loaded: LoadedModel, asked: Sequence[Asking]) -> Spoken:
    questions = Asked([asking.conversation for asking in asked], context.plan.outcome.max_tokens)
    return Spoken(loaded.info.stage, chat_answers(loaded, questions, context.plan.seed))


def _speech_facts(
    context: Context, models: tuple[LoadedModel, LoadedModel], asked: Sequence[Asking], after: Spoken
) -> list[Fact]:
    """The distance travelled, and whether answers end."""
    start, result = models
    rows = [(asking.ids, said.ids) for asking, said in zip(asked, after.completions, strict=True)]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows) + len(result.soft_ids)
    fit = FitSettings(lr=1.0, max_length=longest, forward_rows=getattr(context.plan.train, "forward_rows", 8))
    behind = [((*result.soft_ids, *prompt), answer) for prompt, answer in rows]
    gaps = np.array(row_logprobs(result, behind, fit)) - np.array(row_logprobs(start, rows, fit))
    ended = sum(said.finish_reason == "stop" for said in after.completions)
    return [
        Fact("KL to the start", float(gaps.mean()), "nats an answer"),
        Fact("answers that end", ended / len(rows), "%"),
        Fact("length of an answer", sum(len(answer) for _, answer in rows) / len(rows), "tokens"),
    ]


def _win_tables(
    context: Context, start: LoadedModel, asked: Sequence[Asking], spoken: tuple[Spoken, Spoken]
) -> list[Table]:
    """How often each judge of the plan prefers the answer of afterwards; rewards that were trained on say so."""
    judges = [(part, "trained on") for part in context.plan.rewards if part.models]
    for other, standing in ((context.plan.judge, "never trained on"), (context.plan.select, "chose the checkpoint")):
        if other is not None:
            judges.append((RewardPart("model", other.name, hash=other.hash), standing))
    lines: list[tuple[Cell, ...]] = []
    for part, standing in judges:
        answers = [
            [(asking.ids, said.ids) for asking, said in zip(asked, one.completions, strict=True)] for one in spoken
        ]
        scores = [part_scores(context, part, start, some).tolist() for some in answers]
        found = win_rate.evaluate_scores((scores[1], scores[0]), spoken[1].texts, spoken[0].texts, seed=0)
        rate = Interval(found["win_rate"], found["win_rate_low"], found["win_rate_high"], 0.5)
        controlled = found["win_rate_length_controlled"]
        lines.append((part.name, standing, rate, controlled, found["score_difference"]))
    columns = ("judge", "standing", "wins %", "length-controlled %", "score gained")
    return [Table.of("Answers of afterwards against those of before", columns, lines)] if lines else []


def _samples(context: Context, asked: Sequence[Asking], spoken: tuple[Spoken, Spoken]) -> tuple[Sample, ...]:
    shown = context.plan.outcome.shown
    prompts = ["\n".join(f"{m.role}: {m.text}" for m in asking.conversation.messages) for asking in asked[:shown]]
    return tuple(
        Sample(
            prompt,
            tuple(
                Answer(stage, one.completions[place].text, one.completions[place].finish_reason == "stop")
                for stage, one in zip(("before", "after"), spoken, strict=True)
            ),
        )
        for place, prompt in enumerate(prompts)
    )


# Reward models.


def _report_reward(context: Context, start: LoadedModel, result: LoadedModel) -> None:
    """Held-out pair accuracy by source and length, calibration, and what the score follows (C18)."""
    cut = cut_of(context, start.renderer)
    held_out = [as_ranking(example) for example in examples_of(context, HELD_OUT)]

    def score(some: Sequence[Ranking]) -> list[list[float]]:
        answers = [
            answer_ids(cut, ranking.prompt, text, ended=ended)
            for ranking in some
            for text, ended in zip(ranking.completions, ranking.ended, strict=True)
        ]
        scores = iter(score_answers(scalar(result), answers, start.tokenizer.pad_id).tolist())
        return [[next(scores) for _ in ranking.completions] for ranking in some]

    found = reward_accuracy.evaluate(score, held_out, seed=context.plan.seed)
    context.report = replace(
        context.report,
        headline=Fact("held-out pairs right", found["accuracy"], "%"),
        facts=(
            Fact("calibration error", found["calibration_error"]),
            Fact("correlation of score and length", found["length_correlation"]),
            Fact("correlation of score and length within a prompt", found["length_correlation_within"]),
        ),
        tables=(accuracy_table(found),),
    )


def as_ranking(example: FeedbackExample) -> Ranking:
    """A pair is a ranking of two; one that a soft label prefers the second of is turned round."""
    if isinstance(example, Ranking):
        return example
    assert isinstance(example, PairExample)
    ranks = (1, 2) if example.probability > 0.5 else (2, 1) if example.probability < 0.5 else (1, 1)
    return Ranking(
        example.prompt,
        (example.chosen, example.rejected),
        ranks,
        (True, True),
        ("chosen", "rejected"),
        example.provenance,
        example.judgement,
        shown={"chosen": (1, 2), "rejected": (2, 1), None: None}[example.shown_first],
    )
