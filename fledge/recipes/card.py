"""The run card: everything a run can say about itself, as one JSON file and one HTML page made from it alone.

`build_card` reads what the stages left in the run folder; card_page.py writes `card.json` and the page beside it.
A stage that has not run stands on the card as not run.

Source of the idea: Mitchell et al. 2019, "Model Cards for Model Reporting".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fledge.config import from_json
from fledge.errors import RunError
from fledge.recipes import card_format as say
from fledge.recipes.card_curves import Steps, curves, read_metrics, thin_curve
from fledge.recipes.card_lineage import LineageNode, read_lineage
from fledge.recipes.card_ring import Centre, Stop, Theme, ring_svg
from fledge.recipes.card_stages import STAGES, UNCHARTED, StageKind, is_alignment, kind_of, stages_of
from fledge.recipes.report import Answer, Claim, Fact, Licence, Sample, StageReport, read_report
from fledge.recipes.runs import ALIGNED_STAGES, SERVED_STAGES, Cost, read_manifest
from fledge.train.metrics import FLOPS_FORMULA, MFU_FORMULA

FORMAT = 1
State = Literal["finished", "unfinished", "not run"]
# Whose parameter count the card names, the furthest first.
_MODELS = (*ALIGNED_STAGES, *SERVED_STAGES, "reward")


@dataclass(frozen=True)
class StageSection:
    """One stage on the card. `report.curves` holds the curves of metrics.jsonl too, thinned for drawing."""

    name: str
    title: str
    blurb: str
    state: State
    report: StageReport
    cost: Cost | None = None
    inputs: dict[str, str] | None = None
    outputs: dict[str, str] | None = None
    versions: dict[str, str] | None = None


@dataclass(frozen=True)
class StageClaim:
    """A claim, and the title of the stage that makes it."""

    stage: str
    claim: Claim


@dataclass(frozen=True)
class SidePage:
    """A page beside the card, and the stage it is about."""

    stage: str
    title: str
    file: str


@dataclass(frozen=True)
class Card:
    """The whole card; `card.json` is this as JSON. `finished` is the ISO time of the last finished stage, in UTC."""

    format: int
    name: str
    recipe: str | None
    parameters: int | None
    seed: int | None
    finished: str | None
    versions: dict[str, str]
    stages: tuple[StageSection, ...]
    claims: tuple[StageClaim, ...]
    samples: tuple[Sample, ...]
    licences: tuple[Licence, ...]
    lineage: tuple[LineageNode, ...]
    formulas: tuple[str, ...]
    plan: Any
    pages: tuple[SidePage, ...] = ()

    @property
    def total(self) -> Cost:
        """All stages together; memory is the highest peak, and there is no common MFU."""
        costs = [stage.cost for stage in self.stages if stage.cost is not None]
        return Cost(
            seconds=sum(cost.seconds for cost in costs),
            tokens=sum(cost.tokens for cost in costs),
            flops=sum(cost.flops for cost in costs),
            peak_rss_bytes=max((cost.peak_rss_bytes for cost in costs), default=0),
        )


def build_card(run: Path) -> Card:
    """The card of the run folder `run`, finished or not. Raises `RunError` for a folder without a readable plan, and
    for a report, manifest or metrics file that is damaged."""
    plan = _plan(run)
    metrics = read_metrics(run / "metrics.jsonl")
    stages = tuple(_section(run, kind, metrics.get(kind.name, {}), plan) for kind in _kinds(run, plan))
    reports = [stage.report for stage in stages]
    counts = {report.stage: report.parameters for report in reports if report.parameters is not None}
    return Card(
        format=FORMAT,
        name=run.resolve().name,
        recipe=_named(plan, "recipe", str) or _named(plan, "method", str),
        parameters=next((counts[name] for name in _MODELS if name in counts), None),
        seed=_named(plan, "seed", int),
        finished=_finished(run, stages),
        versions=next((s.versions for s in reversed(stages) if s.versions), {}),
        stages=stages,
        claims=tuple(StageClaim(stage.title, claim) for stage in stages for claim in stage.report.claims),
        samples=_joined(sample for report in reports for sample in report.samples),
        licences=tuple(licence for report in reports for licence in report.licences),
        lineage=read_lineage(run),
        formulas=(FLOPS_FORMULA, MFU_FORMULA),
        plan=plan,
    )


def read_card(path: Path) -> Card:
    """Raises `RunError` naming the file if it is missing, damaged, or of another format."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise ValueError(f"format {data.get('format')}, this fledge reads {FORMAT}")
        return from_json(Card, data)
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is not a run card: {error}; make it again with `fledge card RUN`") from error


def ring_picture(card: Card, *, theme: Theme = "auto", labelled: bool = True) -> str:
    """The ring of `card` as a complete SVG file, as the README shows it."""
    return ring_svg(_centre(card), _stops(card), theme=theme, labelled=labelled)


def _kinds(run: Path, plan: Any) -> list[StageKind]:
    """The stages of the ring, or those of an alignment run that have begun; then any other that has finished."""
    known = {kind.name for kind in stages_of(plan)}
    others = sorted({path.parent.name for path in run.glob("*/manifest.json")} - known)
    if not is_alignment(plan):
        return [*STAGES, *(kind_of(name) for name in others)]
    begun = [kind for kind in stages_of(plan) if (run / kind.name).is_dir()]
    # Members of an ensemble stand beside the first one.
    place = next((n for n, kind in enumerate(begun, start=1) if kind.name == plan["method"]), len(begun))
    return [*begun[:place], *(kind_of(name) for name in others), *begun[place:]]


def _section(run: Path, kind: StageKind, steps: Steps, plan: Any) -> StageSection:
    folder = run / kind.name
    manifest = read_manifest(folder)
    has_report = manifest is not None and (folder / "report.json").is_file()
    report = read_report(folder / "report.json") if has_report else StageReport(kind.name)
    told = {curve.title for curve in report.curves}
    skip = frozenset(UNCHARTED) | {name for name in steps if name.startswith("count/")}
    logged = tuple(curve for curve in curves(steps, kind.charts, skip, plan) if curve.title not in told)
    report = replace(report, curves=(*(thin_curve(curve) for curve in report.curves), *logged))
    if manifest is None:
        state: State = "unfinished" if folder.is_dir() else "not run"
        return StageSection(kind.name, kind.title, kind.blurb, state, report)
    return StageSection(
        kind.name,
        kind.title,
        kind.blurb,
        "finished",
        report,
        manifest.cost,
        manifest.inputs,
        manifest.outputs,
        manifest.versions,
    )


def _plan(run: Path) -> Any:
    path = run / "plan.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); is {run} a run folder?") from error


def _named(plan: Any, key: str, kind: type[Any]) -> Any:
    value = plan.get(key) if isinstance(plan, dict) else None
    return value if isinstance(value, kind) else None


def _finished(run: Path, stages: Sequence[StageSection]) -> str | None:
    """When the last stage finished, as its manifest says; of an older one, its file, which may be a later copy."""
    times = []
    for stage in stages:
        path = run / stage.name
        manifest = read_manifest(path)
        if manifest is not None:
            written = datetime.fromtimestamp((path / "manifest.json").stat().st_mtime, UTC)
            times.append(manifest.finished or written.isoformat(timespec="seconds"))
    return max(times, default=None)


def _joined(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Samples of different stages to the same prompt as one, answers in the order of the ring, one a stage."""
    answers: dict[str, dict[str, Answer]] = {}
    for sample in samples:
        answers.setdefault(sample.prompt, {}).update({answer.stage: answer for answer in sample.answers})
    order = {kind.name: index for index, kind in enumerate(STAGES)}
    return tuple(
        Sample(prompt, tuple(sorted(given.values(), key=lambda answer: order.get(answer.stage, len(order)))))
        for prompt, given in answers.items()
    )


def _centre(card: Card) -> Centre:
    total = card.total
    lines = []
    if card.parameters is not None:
        lines.append(f"{say.count(card.parameters)} parameters")
    if total.seconds:
        lines.append(f"raised in {say.seconds(total.seconds)}")
    if card.claims:
        reached = sum(1 for entry in card.claims if entry.claim.reached)
        lines.append(f"{reached} of {len(card.claims)} targets reached")
    return Centre(card.name, tuple(lines))


def _stops(card: Card) -> list[Stop]:
    """One stop for each place in the ring; a stage that shares a place adds its cost, and its headline as a line."""
    places = {kind.name: kind.part_of for kind in stages_of(card.plan)}
    stops = []
    for stage in card.stages:
        if stage.name not in places or places[stage.name] is not None:
            continue
        guests = [other for other in card.stages if places.get(other.name) == stage.name]
        seconds = sum(s.cost.seconds for s in (stage, *guests) if s.cost is not None)
        headline = stage.report.headline or Fact("", None)
        lines = (
            _cost_line(stage, seconds),
            *(_guest_line(g) for g in guests if g.report.headline is not None),
        )
        has_run = stage.state == "finished"
        stops.append(Stop(stage.title, headline.label, say.fact(headline), headline.unit, lines, seconds, has_run))
    return stops


def _guest_line(guest: StageSection) -> str:
    headline = guest.report.headline or Fact("", None)
    return f"{guest.title.lower()} {say.fact(headline)} {headline.unit}".rstrip()


def _cost_line(stage: StageSection, seconds: float) -> str:
    if stage.cost is None:
        return stage.state
    tokens = f" · {say.count(stage.cost.tokens)} tokens" if stage.cost.tokens else ""
    return say.seconds(seconds) + tokens
