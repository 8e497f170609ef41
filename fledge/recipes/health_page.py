"""The health page of a reward model: `health.json` as sections of figures, charts and tables (pages.py draws them).

What people agree on sets the ceiling: InstructGPT's labelers agree with one another on 72.6 +- 1.5 % of comparisons,
held-out labelers on 77.3 +- 1.3 %; its reward model is right on 72.4 +- 0.4 % of its own labelers' and on 69.6 +- 0.9 %
of held-out labelers' (Ouyang et al. 2022, 2203.02155, sections 3.4 and 4.1 and appendix E.2).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.config import from_json
from fledge.errors import RunError
from fledge.evals.reward_health import Bin, Disagreement, Group, Lengths, Positions, Probed, Share
from fledge.recipes.pages import Page, Section
from fledge.recipes.report import Cell, Claim, Curve, Fact, Interval, Series, Table
from fledge.types import Metrics

FORMAT = 1
HEALTH = "health.json"
CEILING_SOURCE = "Ouyang et al. 2022 (2203.02155), sections 3.4 and 4.1"
# (who, share, half of the interval) of the paper.
ANCHORS = (
    ("InstructGPT: its reward model, own labelers", 0.724, 0.004),
    ("InstructGPT: its reward model, held-out labelers", 0.696, 0.009),
    ("InstructGPT: labelers with one another", 0.726, 0.015),
    ("InstructGPT: held-out labelers with one another", 0.773, 0.013),
)
HUMAN_CEILING = 0.773
MAX_CALIBRATION_ERROR = 0.1


@dataclass(frozen=True)
class HealthReport:
    """All that was measured; `health.json` is this as JSON. `models` are the hashes of the members."""

    format: int
    name: str
    models: tuple[str, ...]
    rankings: int
    accuracy: Share
    sources: tuple[Group, ...]
    labelers: tuple[Group, ...]
    confidence: tuple[Group, ...]
    makers: tuple[Group, ...]
    bins: tuple[Bin, ...]
    calibration_error: float
    lengths: Lengths
    positions: Positions | None
    disagreement: Disagreement | None
    agreement: dict[str, float] | None
    probes: tuple[Probed, ...]


def read_health(path: Path) -> HealthReport:
    """Raises `RunError` naming the file if it is missing, damaged, or of another format."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise ValueError(f"format {data.get('format')}, this fledge reads {FORMAT}")
        return from_json(HealthReport, data)
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is no health report: {error}; delete its stage and run the command again") from error


def findings(report: HealthReport) -> tuple[Claim, ...]:
    """What a healthy reward model does, each with its figure."""
    claims = [
        Claim(
            "held-out pairs in the right order: surely more than by chance",
            report.accuracy.low, ">", 0.5, "%", f"lower bound; {_n(report.accuracy)}",
        ),
        Claim(
            "calibration error",
            report.calibration_error, "<", MAX_CALIBRATION_ERROR, "", "0.1: what it says is 10 points off on average",
        ),
    ]  # fmt: skip
    for probe in report.probes:
        if probe.fooled is not None:
            claims.append(
                Claim(
                    f"{probe.name}: scored above the best answer",
                    probe.fooled.high, "<", 0.5, "%", f"upper bound; {probe.n} prompts; {probe.what}",
                )
            )  # fmt: skip
    return tuple(claims)


def health_page(report: HealthReport) -> Page:
    """The page, section by section; one that has nothing to show says why."""
    members = f", mean of {len(report.models)} members" if len(report.models) > 1 else ""
    return Page(
        title=f"{report.name}: health of the reward model",
        lead=f"{report.rankings} held-out rankings, {report.accuracy.pairs} pairs{members}; in brackets 95 % intervals",
        sections=(
            _overview(report),
            _groups(report),
            _calibration(report),
            _length(report.lengths),
            _position(report.positions),
            *((_ensemble(report.disagreement),) if report.disagreement else ()),
            _probes(report),
        ),
        footer=(
            "Made by fledge from health.json, which the stage health measured on prompts that the model never trained "
            "on. Intervals by bootstrap over prompts."
        ),
    )


def _overview(report: HealthReport) -> Section:
    rows: list[tuple[Cell, ...]] = [
        ("this reward model", _interval(report.accuracy, HUMAN_CEILING), report.accuracy.pairs)
    ]
    rows += [(who, Interval(value, value - half, value + half), None) for who, value, half in ANCHORS]
    rows += _own_labelers(report.agreement)
    claims = findings(report)
    return Section(
        "overview",
        "At a glance",
        "A reward model can hardly agree with people more often than people agree with each other.",
        facts=(
            Fact("held-out pairs right", report.accuracy.value, "%"),
            Fact("calibration error", report.calibration_error),
            Fact("checks passed", f"{sum(bool(claim.reached) for claim in claims)} of {len(claims)}"),
        ),
        claims=claims[:2],
        tables=(
            Table.of(
                "Agreement with labels, beside the human ceiling",
                ("who", "agree %", "pairs"),
                rows,
                f"The dashed line is at 77.3 %. Source of InstructGPT's figures: {CEILING_SOURCE}.",
            ),
        ),
    )


def _own_labelers(agreement: Metrics | None) -> list[tuple[Cell, ...]]:
    if agreement is None:
        return [("the labelers of these data with one another: nothing was judged twice", None, None)]

    def row(who: str, name: str) -> tuple[Cell, ...]:
        value = Interval(agreement[name], agreement[f"{name}_low"], agreement[f"{name}_high"], HUMAN_CEILING)
        return (who, value, round(agreement["agreement_units"]))

    rows = [row("the labelers of these data with one another", "agreement")]
    if "agreement_human_ai" in agreement:
        rows.append(row("their human and AI labels", "agreement_human_ai"))
    return rows


def _groups(report: HealthReport) -> Section:
    kinds = (
        ("source", report.sources, "the data name none"),
        ("labeler", report.labelers, "the data do not say who judged"),
        ("confidence of the labeler", report.confidence, "the data do not say how sure labelers were"),
        ("who wrote the two answers", report.makers, "the data do not say who wrote the answers"),
    )
    tables = [_group_table(f"By {what}", what, found, why) for what, found, why in kinds]
    return Section(
        "groups",
        "Accuracy by group",
        "Where the interval of a group lies below the others, the model has not learned that group's labels.",
        tables=tuple(tables),
    )


def _group_table(title: str, what: str, found: tuple[Group, ...], why: str) -> Table:
    rows = [(g.name, _interval(g.accuracy, 0.5), g.accuracy.pairs, g.accuracy.prompts) for g in found]
    return Table.of(title, (what, "right %", "pairs", "prompts"), rows, "" if rows else f"Not measured: {why}.")


def _calibration(report: HealthReport) -> Section:
    said = [one.confidence for one in report.bins]
    curve = Curve(
        "Reliability diagram",
        "what the model says",
        "how often it is right",
        (
            Series.of("measured", said, [one.accuracy.value for one in report.bins]),
            Series.of("perfectly calibrated", [0.5, 1.0], [0.5, 1.0]),
        ),
        note="What it says is sigmoid(margin). Below the diagonal it is too sure, above it not sure enough.",
    )
    rows = [
        (f"{100 * one.low:.0f} to {100 * one.high:.0f}", one.confidence, _interval(one.accuracy), one.accuracy.pairs)
        for one in report.bins
    ]
    table = Table.of("The same as figures", ("says %", "on average %", "right %", "pairs"), rows)
    text = (
        f"Expected calibration error {report.calibration_error:.3f} (Guo et al. 2017). Policies are trained on score "
        "differences as if they were log-odds."
    )
    return Section("calibration", "Calibration", text, curves=(curve,), tables=(table,))


def _length(found: Lengths) -> Section:
    shares = (
        ("labelers prefer the longer answer", found.labelers_prefer_longer),
        ("the model prefers the longer answer", found.model_prefers_longer),
    )
    rows = [(who, _interval(share), share.pairs) for who, share in shares if share is not None]
    correlations = (
        ("over all answers", found.correlation),
        ("within a prompt", found.correlation_within),
    )
    lines = [(where, _interval(share), share.pairs, share.prompts) for where, share in correlations]
    return Section(
        "length",
        "Length",
        "A model that prefers the longer answer much more often than its labelers do rewards length itself.",
        tables=(
            Table.of("Who prefers the longer answer", ("who", "longer %", "pairs"), rows),
            Table.of("Correlation of score and length", ("where", "Pearson's r", "answers", "prompts"), lines),
            _group_table("Accuracy by length", "pairs", found.groups, "no pairs"),
        ),
    )


def _position(found: Positions | None) -> Section:
    if found is None:
        text = "Not measured: the data do not say which answer was shown first (shown in labels, shown_first in pairs)."
        return Section("position", "Position", text)
    rows = [
        (
            "labelers prefer what they saw first",
            _interval(found.labelers_prefer_first),
            found.labelers_prefer_first.pairs,
        ),
        ("the model agrees with the first", _interval(found.model_prefers_first), found.model_prefers_first.pairs),
    ]
    return Section(
        "position",
        "Position",
        "The model reads one answer at a time and cannot see a place; a liking for the first was learned from labels.",
        tables=(
            Table.of("What stood first", ("who", "first %", "pairs"), rows),
            _group_table("Accuracy by place", "pairs", found.groups, "no pairs"),
        ),
    )


def _ensemble(found: Disagreement) -> Section:
    rows: list[tuple[Cell, ...]] = [
        (f"member {number}", _interval(share, 0.5), share.pairs) for number, share in enumerate(found.members, start=1)
    ]
    for name, share in (("all members choose alike", found.agreed), ("members are divided", found.divided)):
        if share is not None:
            rows.append((name, _interval(share, 0.5), share.pairs))
    return Section(
        "ensemble",
        "Ensemble",
        "Where members disagree, the score is least to be trusted: there an optimiser will look.",
        facts=(Fact("mean spread of scores", found.spread),),
        tables=(Table.of("Members", ("pairs", "right %", "number"), rows),),
    )


def _probes(report: HealthReport) -> Section:
    rows: list[tuple[Cell, ...]] = [
        (
            probe.name,
            probe.what,
            None if probe.fooled is None else _against(probe.fooled),
            None if probe.change is None else _interval(probe.change),
            probe.n,
            probe.verdict,
        )
        for probe in report.probes
    ]
    return Section(
        "probes",
        "Adversarial probes",
        "Each answer below is made from the best one and is worse than it. A healthy model scores it lower nearly "
        "always; where it does not, a policy will find out.",
        tables=(
            Table.of(
                "Altered answers against the best ones",
                ("probe", "what", "best answer wins %", "score changes by", "prompts", "verdict"),
                rows,
                "Resists: the interval lies above 50 %. FOOLED: below it. The spread of the training answers is 1.",
            ),
        ),
    )


def _interval(share: Share, mark: float | None = None) -> Interval:
    return Interval(share.value, share.low, share.high, mark)


def _against(share: Share) -> Interval:
    """The share of the other side of a contest."""
    return Interval(1 - share.value, 1 - share.high, 1 - share.low, 0.5)


def _n(share: Share) -> str:
    return f"{share.pairs} pairs of {share.prompts} prompts"
