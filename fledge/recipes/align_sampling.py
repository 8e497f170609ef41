"""Learning from the best of one's own answers in an alignment run: rejection sampling (best of n), and FeedME.

Best of n draws and scores in a stage of its own, a line a stretch of prompts, so that it goes on where it stopped;
its imitation is supervised fine-tuning. FeedME samples, keeps and learns in rounds (rl/feedme.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fledge.data.pack import PackedRows, PieceList
from fledge.errors import DataError
from fledge.formats.checkpoint import LoadedModel, load_state
from fledge.recipes.align_data import HELD_OUT, TRAIN, askings_of, cut_of, demonstration, examples_of, read_lines
from fledge.recipes.align_demonstrations import imitate
from fledge.recipes.align_models import Context, save_aligned, start_of, trainable_model
from fledge.recipes.align_offline import parts
from fledge.recipes.align_rl import world_of
from fledge.recipes.report import Curve, Fact, Series
from fledge.recipes.training import Keeper, record_step
from fledge.rl.best_of import Scored, accepted, expected_best, kl_bound, sample_scored
from fledge.rl.feedme import Demonstration, FeedME, piece_of, rated_high
from fledge.rl.judge import Judge
from fledge.rl.prompts import seed_of
from fledge.train.metrics import JsonLines
from fledge.types import Completion, RatedExample


def samples_stage(context: Context) -> None:
    """`samples` answers to every training prompt, with their scores, in `samples.jsonl`."""
    settings, start = context.plan.train, start_of(context)
    done = len(read_lines(context.path / "samples.jsonl"))
    log = JsonLines(context.path / "samples.jsonl", done, stage=context.name)
    try:
        with Judge() as judge:
            world = world_of(context, start, judge)
            shape = world.shape(settings.prompt_length, settings.response_length)
            stretches = parts(world.prompts, settings.prompts_at_once)
            for number in range(done, len(stretches)):
                found = sample_scored(
                    world,
                    start.model,
                    stretches[number],
                    shape,
                    n=settings.samples,
                    temperature=settings.temperature,
                    seed=seed_of("sampling", context.plan.seed, number),
                )
                log.write({"stage": context.name, "step": number + 1, "scored": [_as_json(one) for one in found]})
                context.save_cost()
                context.listener.step(context.name, number + 1, len(stretches), {})
    finally:
        log.close()
    context.report = replace(context.report, **_expectations(_scored(context)))


def best_of_n_stage(context: Context) -> None:
    """Imitate the best answers; those that ran out of tokens are not kept."""
    settings, start = context.plan.train, start_of(context)
    kept = accepted([_ended(one) for one in _scored(context)], threshold=settings.threshold, top=settings.top)
    if not kept:
        raise DataError("no answer was good enough and ended; lower train.threshold, or raise train.response_length")
    pieces = [piece_of(prompt, completion.ids) for prompt, completion in kept]
    rows = PackedRows(PieceList(pieces), settings.fit.max_length, context.plan.seed)
    context.report = replace(context.report, facts=(Fact("answers kept", len(kept)),))
    start = replace(start, model=trainable_model(context, start.model))
    imitate(context, start, rows, settings.fit, rows.num_steps(settings.fit.epochs, settings.fit.batch))


def _ended(one: Scored) -> Scored:
    """The same without the scores of answers that ran out of tokens: half an answer is nothing to imitate."""
    scored = zip(one.scores, one.completions, strict=True)
    return replace(one, scores=tuple(score if said.finish_reason == "stop" else math.nan for score, said in scored))


def feedme_stage(context: Context) -> None:
    """Rounds of sampling, rating, keeping and imitating, beside the demonstrations among the data."""
    start = start_of(context)
    policy = trainable_model(context, start.model)
    with Judge() as judge:
        world = world_of(context, start, judge)
        cut = cut_of(context, start.renderer)
        held_out = [asking.ids for asking in askings_of(context, HELD_OUT, cut)]
        shown, rated = _demonstrations(context, start)
        feedme = FeedME(context.plan.train, policy, world, [*shown, *rated], held_out)
        saved = load_state(context.path)
        if saved is not None:
            feedme.load(saved[1], saved[2])
        _feedme_rounds(context, feedme)
    save_aligned(context, policy, start, {"start": start.hash})
    context.report = replace(
        context.report,
        parameters=sum(parameter.numel() for parameter in policy.parameters()),
        facts=(
            Fact("rounds", feedme.round_number),
            Fact("answers kept", len(feedme.kept)),
            Fact("demonstrations", len(shown)),
            Fact("answers that people rated high enough", len(rated)),
        ),
    )


def _feedme_rounds(context: Context, feedme: FeedME) -> None:
    keeper, rounds = Keeper(context), feedme.config.rounds
    log = JsonLines(context.run / "metrics.jsonl", feedme.round_number, stage=context.name)
    try:
        with context.interrupts.deferred():
            while feedme.round_number < rounds:
                began = time.perf_counter()
                done = feedme.round()
                context.add_cost(busy_seconds=time.perf_counter() - began)
                record_step(context, log, feedme.round_number, rounds, done.metrics)
                keeper.after_step(feedme.round_number, rounds, lambda: (feedme.tensors(), feedme.scalars()))
    finally:
        log.close()


def _demonstrations(context: Context, start: LoadedModel) -> tuple[list[Demonstration], list[Demonstration]]:
    """(the first answers of the conversations among the data, the answers that people rated high enough)."""
    cut = cut_of(context, start.renderer)
    shown: list[Demonstration] = []
    rated: list[tuple[Demonstration, float]] = []
    for example in examples_of(context, TRAIN):
        found = demonstration(example, cut)
        if found is not None and isinstance(example, RatedExample):
            rated.append((found, example.rating))
        elif found is not None:
            shown.append(found)
    return shown, rated_high(rated, context.plan.train)


def _as_json(one: Scored) -> dict[str, Any]:
    answers = [[list(said.ids), said.text, said.finish_reason] for said in one.completions]
    scores = [None if math.isnan(score) else score for score in one.scores]  # JSON has no NaN
    return {"prompt": list(one.prompt), "answers": answers, "scores": scores}


def _scored(context: Context) -> list[Scored]:
    """What the stage `samples` left."""
    found = []
    for line in read_lines(context.run / "samples" / "samples.jsonl"):
        for one in line["scored"]:
            said = tuple(Completion(text, tuple(ids), (), reason) for ids, text, reason in one["answers"])
            scores = tuple(math.nan if score is None else score for score in one["scores"])
            found.append(Scored(tuple(one["prompt"]), said, scores))
    return found


def _expectations(scored: Sequence[Scored]) -> dict[str, Any]:
    """What best-of-n is worth for every n, and at most how far it is from the policy (C55)."""
    whole = [one.scores for one in scored if not any(map(math.isnan, one.scores))]
    if not whole:
        return {}
    scores_PN = torch.tensor(whole)
    counts = range(1, scores_PN.shape[1] + 1)
    values = [expected_best(scores_PN, n) for n in counts]
    bounds = [kl_bound(n) for n in counts]
    curve = Curve(
        "Best of n", "KL to the policy, at most (nats)", "mean score", (Series.of("best of n", bounds, values),)
    )
    return {
        "headline": Fact("score gained", values[-1] - values[0], f"best of {len(values)}"),
        "facts": (Fact("KL, at most", bounds[-1], "nats an answer"), Fact("prompts", len(scored))),
        "curves": (curve,),
    }
