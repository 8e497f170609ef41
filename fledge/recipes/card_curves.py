"""From `metrics.jsonl` to the curves on the run card.

The file has one JSON object a step: {"stage": ..., "step": ..., metric: number, ...}. Known metrics share charts as
`CHARTS` says; every other numeric metric gets a small chart of its own, so nothing that was logged stays unseen.
Long series are thinned so that every spike survives: of each bucket of steps the lowest and the highest stay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fledge.errors import RunError
from fledge.recipes.report import Curve, Reference, Series

MAX_POINTS = 400  # twice the width of a chart in pixels shows no more than this
SMOOTH_FROM = 40  # shorter series are drawn as they are


@dataclass(frozen=True)
class Chart:
    """Which metrics share one chart: `metrics` maps the name in the file to the name of the line.

    `target` is the dotted path, in the plan, of a value to draw as a reference.
    """

    title: str
    y_label: str
    metrics: Mapping[str, str]
    zoom: bool = False
    minor: bool = False
    target: str | None = None


Steps = dict[str, list[tuple[float, float | None]]]  # metric -> (step, value) in order of step


def read_metrics(path: Path) -> dict[str, Steps]:
    """Stage -> metric -> points. A torn last line (the process was killed while writing) is left out; a step written
    twice (after a resume) counts once, the later line wins. Raises `RunError` for damage anywhere else."""
    found: dict[str, dict[str, dict[float, float | None]]] = {}
    for line in _lines(path):
        stage, step = str(line.get("stage", "run")), line.get("step")
        if not isinstance(step, int | float):
            continue
        metrics = found.setdefault(stage, {})
        for name, value in line.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            metrics.setdefault(name, {})[float(step)] = float(value) if math.isfinite(value) else None
    return {
        stage: {name: sorted(points.items()) for name, points in metrics.items()} for stage, metrics in found.items()
    }


def curves(steps: Steps, charts: Sequence[Chart], skip: frozenset[str], plan: Any) -> tuple[Curve, ...]:
    """The charts of one stage, the known first; metrics in `skip` are left to others."""
    left = {name: points for name, points in steps.items() if name not in skip and len(points) > 1}
    made = []
    for chart in charts:
        lines = [(label, left.pop(name)) for name, label in chart.metrics.items() if name in left]
        if lines:
            series = tuple(thin(_series(label, points)) for label, points in lines)
            made.append(_curve(chart, series, plan))
    for name in sorted(left):
        title = name.replace("_", " ").replace("/", " · ")
        made.append(Curve(title, "step", "", (thin(_series(name, left[name])),), minor=True))
    return tuple(made)


def _curve(chart: Chart, series: tuple[Series, ...], plan: Any) -> Curve:
    target = None if chart.target is None else _look_up(plan, chart.target)
    references = () if target is None else (Reference("target", target),)
    return Curve(chart.title, "step", chart.y_label, series, references, zoom=chart.zoom, minor=chart.minor)


def thin_curve(curve: Curve) -> Curve:
    """`curve` with every long series thinned and smoothed."""
    return replace(curve, series=tuple(thin(series) for series in curve.series))


def thin(series: Series, max_points: int = MAX_POINTS) -> Series:
    """At most `max_points` of the points, the lowest and highest of every bucket among them, with a trend.

    Six significant digits are kept; a drawing has room for three.
    """
    count = len(series.x)
    if series.smooth:
        return series
    if count < SMOOTH_FROM:
        return Series(series.name, series.x, tuple(_rounded(y) for y in series.y))
    values = np.array([math.nan if y is None else y for y in series.y])
    trend = _centred_mean(values, max(5, count // 25) | 1)
    kept = np.arange(count) if count <= max_points else _extremes(values, max_points // 2)
    return Series(
        series.name,
        tuple(series.x[i] for i in kept),
        tuple(_rounded(series.y[i]) for i in kept),
        tuple(_rounded(float(trend[i])) for i in kept),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(f"{value:.6g}")


def _look_up(plan: Any, path: str) -> float | None:
    """The number at a dotted path of the plan, if there is one."""
    for key in path.split("."):
        plan = plan.get(key) if isinstance(plan, dict) else None
    return float(plan) if isinstance(plan, int | float) else None


def _series(name: str, points: Sequence[tuple[float, float | None]]) -> Series:
    return Series(name, tuple(x for x, _ in points), tuple(y for _, y in points))


def _extremes(values: np.ndarray[Any, Any], num_buckets: int) -> list[int]:
    """Indices, in order, of the first, the last, and each bucket's lowest and highest value."""
    kept = {0, len(values) - 1}
    for bucket in np.array_split(np.arange(1, len(values) - 1), num_buckets - 1):
        if len(bucket) and not np.isnan(values[bucket]).all():
            kept |= {int(bucket[np.nanargmin(values[bucket])]), int(bucket[np.nanargmax(values[bucket])])}
        elif len(bucket):
            kept.add(int(bucket[0]))  # a gap stays a gap
    return sorted(kept)


def _centred_mean(values: np.ndarray[Any, Any], window: int) -> np.ndarray[Any, Any]:
    """The mean over `window` neighbours (fewer at both ends), gaps left out; NaN where there is nothing."""
    known = ~np.isnan(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    # Near an end the window shrinks so that it stays centred, but not below a third: a trend may lean, not jump.
    reach = np.clip(np.minimum(at, len(values) - 1 - at), max(1, window // 6), window // 2)
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    found = counts[last] - counts[first]
    means = (totals[last] - totals[first]) / np.maximum(found, 1)
    return np.where((found > 0) & known, means, math.nan)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _line(raw, f"{path} line {number}")
            if isinstance(line, dict):
                yield line


def _line(raw: bytes, place: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError as error:
        if not raw.endswith(b"\n"):
            return None
        raise RunError(f"{place} is not JSON ({error}); delete that line") from error
