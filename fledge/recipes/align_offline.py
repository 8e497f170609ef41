"""Learning from preferences without sampling: DPO and IPO from pairs, KTO from verdicts, and the frozen reference.

The reference's log-probabilities are had once, in a stage of their own, and read by every epoch (C51): beside an
adapter no second model is needed, beside full tuning none is held while it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fledge.formats.checkpoint import LoadedModel
from fledge.objectives.completions import Ids, frozen_logprobs, lay_out_rows
from fledge.objectives.kto import VerdictIds, balanced_weights, mismatch
from fledge.objectives.preference import PreferenceIds
from fledge.recipes.align_data import HELD_OUT, TRAIN, Verdict, cut_of, read_lines, tokens_of
from fledge.recipes.align_models import Context, save_aligned, save_checkpoint, start_of, trainable_model
from fledge.recipes.align_settings import FitSettings
from fledge.recipes.report import Fact
from fledge.recipes.training import Course, chosen, train
from fledge.train.device import precision
from fledge.train.loop import Pairs, TrainState
from fledge.train.metrics import JsonLines
from fledge.types import Metrics

Rows = Sequence[tuple[Ids, Ids]]
ROWS_A_LINE = 256  # completions scored between two lines of the file, which an interrupted stage goes on behind


def reference_stage(context: Context) -> None:
    """What the frozen start says to every completion that training or measuring will ask about."""
    start = start_of(context)
    cut = cut_of(context, start.renderer)
    rows = {side: rows_of(context, tokens_of(context, side, cut)) for side in (TRAIN, HELD_OUT)}
    total = sum(-(-len(some) // ROWS_A_LINE) for some in rows.values())
    finished = 0
    for side, some in rows.items():
        finished += _write_side(context, start, side, some, (finished, total))
    context.report = replace(context.report, headline=Fact("completions", sum(map(len, rows.values()))))


def _write_side(context: Context, start: LoadedModel, side: str, rows: Rows, progress: tuple[int, int]) -> int:
    """One line a stretch of completions; lines of an earlier sitting are kept. How many lines there are now."""
    path = context.path / f"{side}.jsonl"
    done = len(read_lines(path))
    log = JsonLines(path, done, stage=context.name)
    stretches = parts(rows, ROWS_A_LINE)
    try:
        for number in range(done, len(stretches)):
            found = row_logprobs(start, stretches[number], context.plan.train.fit)
            log.write({"stage": context.name, "step": number + 1, "logprobs": found})
            context.save_cost()
            context.listener.step(context.name, progress[0] + number + 1, progress[1], {})
    finally:
        log.close()
    return len(stretches)


def preference_stage(context: Context) -> None:
    """DPO or IPO, as the settings say."""
    settings, start = context.plan.train, start_of(context)
    pairs = known_pairs(context, TRAIN, start)
    model = trainable_model(context, start.model)
    objective = settings.objective(start.tokenizer.pad_id)

    def batches(state: TrainState, step: int) -> Pairs:
        some = [pairs[i] for i in chosen(len(pairs), per_step(settings.fit, len(pairs)), step, context.plan.seed)]
        return [(objective, objective.collate(part)) for part in parts(some, settings.fit.forward_rows)]

    fit_and_save(context, model, start, Course(fit_plan(settings.fit, len(pairs)), batches, quiet=True))


def kto_stage(context: Context) -> None:
    """KTO; each answer's stranger is the next answer of a fixed shuffled order that has another prompt."""
    settings, start = context.plan.train, start_of(context)
    found = known_verdicts(context, TRAIN, start)
    good = sum(verdict.desirable for verdict in found)
    model: Any = trainable_model(context, start.model)
    objective = settings.objective(start.tokenizer.pad_id, balanced_weights(good, len(found) - good))

    def batches(state: TrainState, step: int) -> Pairs:
        some = [found[i] for i in chosen(len(found), per_step(settings.fit, len(found)), step, context.plan.seed)]
        rows = [objective.collate(part).to(context.device) for part in parts(some, settings.fit.forward_rows)]
        with precision(context.device):
            z0 = objective.baseline(model, rows)
        return [(objective, replace(row, baseline=z0)) for row in rows]

    fit_and_save(context, model, start, Course(fit_plan(settings.fit, len(found)), batches, quiet=True))


def fit_and_save(
    context: Context,
    model: Any,
    start: LoadedModel,
    course: Course,
    measure: Callable[[], Metrics] | None = None,
    finish: Callable[[], None] = lambda: None,
) -> None:
    """Train, let `finish` have its say in the weights, save, and say how it went. Wherever a model is left behind,
    `measure` adds to the step's metrics."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    marks = context.plan.marks(course.fit.steps)

    def leave_behind(state: TrainState, metrics: Metrics) -> None:
        if marks and (state.step in marks or state.step == course.fit.steps) and measure is not None:
            metrics.update(measure())
        if state.step in marks:
            save_checkpoint(context, model, start, state.step)

    train(context, model, replace(course, callbacks=(*course.callbacks, (1, leave_behind))))
    finish()
    save_aligned(context, model, start, {"start": start.hash})
    facts = (Fact("parameters trained", trained), Fact("steps", course.fit.steps))
    context.report = replace(context.report, parameters=parameters, facts=(*context.report.facts, *facts))


def per_step(fit: FitSettings, count: int) -> int:
    return min(fit.batch, count)


def fit_plan(fit: FitSettings, count: int) -> Any:
    """Epochs over `count` examples, two rows each."""
    size = per_step(fit, count)
    return fit.plan(fit.epochs * max(1, count // size), 2 * size, fit.max_length)


def parts(some: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """What passes through the model at once."""
    return [some[place : place + size] for place in range(0, len(some), size)]


# What the reference said.


def rows_of(context: Context, found: Sequence[Any]) -> Rows:
    """Every completion whose reference log-probability is needed, two an example, in order."""
    if context.plan.method == "kto":
        found = strangers(found, context)
        return [(one.prompt, ids) for one in found for ids in (one.completion, one.stranger)]
    return [(pair.prompt, ids) for pair in found for ids in (pair.first, pair.second)]


def strangers(found: Sequence[Verdict], context: Context) -> list[VerdictIds]:
    """In a shuffled order, so that an answer's stranger is not the other answer of its pair."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(context.plan.seed)).tolist()
    return mismatch([found[i] for i in order], max_length=context.plan.train.fit.max_length)


def known_pairs(context: Context, side: str, start: LoadedModel) -> list[PreferenceIds]:
    """The pairs of a side with what the reference says to each."""
    found = tokens_of(context, side, cut_of(context, start.renderer))
    return [replace(pair, reference=known) for pair, known in zip(found, _known(context, side), strict=True)]


def known_verdicts(context: Context, side: str, start: LoadedModel) -> list[VerdictIds]:
    found = strangers(tokens_of(context, side, cut_of(context, start.renderer)), context)
    return [replace(verdict, reference=known) for verdict, known in zip(found, _known(context, side), strict=True)]


@torch.no_grad()
def row_logprobs(loaded: LoadedModel, rows: Rows, fit: FitSettings) -> list[float]:
    """What a model says to each completion; the sum over its tokens."""
    model: Any = loaded.model
    device = next(model.parameters()).device
    model.eval()
    found: list[float] = []
    for some in parts(rows, 2 * fit.forward_rows):
        inputs = lay_out_rows(some, max_length=fit.max_length, pad_id=loaded.tokenizer.pad_id)
        tokens_NT, segments_NT, mask_NT = (tensor.to(device) for tensor in inputs)
        with precision(device):
            found += frozen_logprobs(model, tokens_NT, segments_NT, mask_NT, rows=len(some)).tolist()
    return found


def _known(context: Context, side: str) -> list[tuple[float, float]]:
    """The reference's figures of a side, two an example, as `rows_of` orders them."""
    found = [value for line in read_lines(context.run / "reference" / f"{side}.jsonl") for value in line["logprobs"]]
    return list(zip(found[::2], found[1::2], strict=True))
