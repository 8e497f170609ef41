"""The health of a reward model, measured on held-out rankings: the stage `health` after `fledge align reward`.

An ensemble is measured as what it is used as without caution, the mean of its members, and told apart beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fledge.config import to_json
from fledge.data.feedback import FeedbackExample
from fledge.errors import DataError
from fledge.evals import reward_health as health
from fledge.evals.agreement import evaluate as agreement
from fledge.evals.agreement import labeler_of, verdicts
from fledge.evals.reward_probes import PROBES, Case, Probe
from fledge.files import write_json
from fledge.formats.checkpoint import LoadedModel, load_model
from fledge.recipes.align_data import HELD_OUT, TRAIN, Cut, answer_ids, cut_of, examples_of
from fledge.recipes.align_models import Context, own_stages, scalar, start_of
from fledge.recipes.align_outcome import as_ranking
from fledge.recipes.answers import score_answers
from fledge.recipes.health_page import FORMAT, HEALTH, HealthReport, findings
from fledge.recipes.report import Fact
from fledge.types import Conversation, Metrics, PairExample, Ranking, UnpairedExample

Answer = tuple[Conversation, str, bool]


def health_stage(context: Context) -> None:
    """Measure, write `health.json`, and put what was found on the card."""
    models = [load_model(context.run / name / "model", device=context.device) for name in own_stages(context.plan)]
    start = start_of(context)
    cut, seed = cut_of(context, start.renderer), context.plan.seed
    trained, rankings = ([as_ranking(e) for e in examples_of(context, side)] for side in (TRAIN, HELD_OUT))
    scored = _scored(models, rankings, cut)
    pairs = health.comparisons(scored)
    bins = health.reliability(pairs, seed)
    report = HealthReport(
        format=FORMAT,
        name=context.run.resolve().name,
        models=tuple(loaded.hash for loaded in models),
        rankings=len(rankings),
        accuracy=health.accuracy(pairs, seed),
        sources=health.groups(pairs, health.source_of, seed),
        labelers=(*health.groups(pairs, health.labeler_of, seed), *health.by_standing(pairs, trained, seed)),
        confidence=health.by_confidence(pairs, seed),
        makers=health.groups(pairs, health.makers_of, seed),
        bins=bins,
        calibration_error=health.calibration_error(bins),
        lengths=health.lengths(scored, pairs, seed),
        positions=health.positions(pairs, seed),
        disagreement=health.disagreement(scored, pairs, seed),
        agreement=_agreement([e for side in (TRAIN, HELD_OUT) for e in examples_of(context, side)], seed),
        probes=tuple(_probed(probe, models, rankings, cut, seed) for probe in PROBES),
    )
    write_json(context.path / HEALTH, to_json(report))
    claims = findings(report)
    context.report = replace(
        context.report,
        headline=Fact("checks passed", f"{sum(bool(claim.reached) for claim in claims)} of {len(claims)}"),
        claims=claims,
    )


def _scored(models: Sequence[LoadedModel], rankings: Sequence[Ranking], cut: Cut) -> list[health.Scored]:
    answers = [
        (ranking.prompt, text, ended)
        for ranking in rankings
        for text, ended in zip(ranking.completions, ranking.ended, strict=True)
    ]
    members = [iter(_member_scores(loaded, answers, cut)) for loaded in models]
    scored = []
    for ranking in rankings:
        rows = tuple(tuple(next(scores) for _ in ranking.completions) for scores in members)
        means = tuple(sum(column) / len(column) for column in zip(*rows, strict=True))
        scored.append(health.Scored(ranking, means, rows if len(rows) > 1 else ()))
    return scored


def _member_scores(loaded: LoadedModel, answers: Sequence[Answer], cut: Cut) -> list[float]:
    ids = [answer_ids(cut, prompt, text, ended=ended) for prompt, text, ended in answers]
    return [float(score) for score in score_answers(scalar(loaded), ids, loaded.tokenizer.pad_id)]


def _probed(
    probe: Probe, models: Sequence[LoadedModel], rankings: Sequence[Ranking], cut: Cut, seed: int
) -> health.Probed:
    """The altered answer against the best one, for every held-out prompt to which the probe applies."""
    altered: list[Answer] = []
    best: list[Answer] = []
    for number, ranking in enumerate(rankings):
        top = _best(ranking)
        case = Case(
            asked=ranking.prompt.messages[-1].text,
            best=top,
            worst=_worst(ranking),
            elsewhere=_best(rankings[(number + 1) % len(rankings)]),
            fits=lambda text, prompt=ranking.prompt: _fits(cut, prompt, text),  # type: ignore[misc]
        )
        text = probe.make(case)
        if text is not None and text != top and _fits(cut, ranking.prompt, text):
            altered.append((ranking.prompt, text, True))
            best.append((ranking.prompt, top, True))
    if not altered:
        return health.probed(probe.name, probe.what, (), seed)
    changes = []
    for loaded in models:
        new, old = (_member_scores(loaded, some, cut) for some in (altered, best))
        changes.append([a - b for a, b in zip(new, old, strict=True)])
    means = [sum(column) / len(column) for column in zip(*changes, strict=True)]
    return health.probed(probe.name, probe.what, means, seed)


def _best(ranking: Ranking) -> str:
    return ranking.completions[ranking.ranks.index(min(ranking.ranks))]


def _worst(ranking: Ranking) -> str:
    return ranking.completions[ranking.ranks.index(max(ranking.ranks))]


def _fits(cut: Cut, prompt: Conversation, text: str) -> bool:
    try:
        answer_ids(cut, prompt, text)
    except DataError:
        return False
    return True


def _agreement(examples: Sequence[FeedbackExample], seed: int) -> Metrics | None:
    """How the labelers of the data agree with one another; None where nothing was judged twice."""
    judged = [e for e in examples if isinstance(e, PairExample | Ranking | UnpairedExample)]
    made_by_models = {labeler_of(e.judgement) for e in judged if e.judgement and e.judgement.kind != "human"}
    try:
        return agreement(verdicts(judged), is_ai=made_by_models.__contains__, seed=seed)
    except DataError:
        return None
