"""What a stage tells the run card: facts, curves, bars, tables, claims, samples, licences.

Each stage of a recipe fills one `StageReport` and leaves it as `runs/NAME/<stage>/report.json`; recipes/card.py
reads those files and knows nothing else about a stage. Values only: charts.py draws, card.py makes the page.

A claim with a threshold computes for itself whether it was reached, so no stage can bend it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from fledge.config import from_json, to_json
from fledge.errors import RunError
from fledge.files import write_json

CellT = TypeVar("CellT")
Comparison = Literal["<", "<=", ">", ">="]

_HOLDS: Mapping[str, Callable[[float, float], bool]] = {
    "<": lambda value, threshold: value < threshold,
    "<=": lambda value, threshold: value <= threshold,
    ">": lambda value, threshold: value > threshold,
    ">=": lambda value, threshold: value >= threshold,
}


@dataclass(frozen=True)
class Interval:
    """A measured value with its confidence interval; `mark` is what to compare it with (0.5 for a win rate)."""

    value: float
    low: float
    high: float
    mark: float | None = None

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"an interval holds its value: got {self.value} outside [{self.low}, {self.high}]")


Cell = str | int | float | bool | None | Interval


@dataclass(frozen=True)
class Fact:
    """One labelled figure: `Fact("validation", 1.41, "bits per byte")`. A fraction under unit "%" reads times 100."""

    label: str
    value: str | int | float | None
    unit: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _clean(self.value))


@dataclass(frozen=True)
class Table:
    """Rows under named columns; the first column names the row. Units belong in the column names.

    A share goes in as a fraction under a column whose name ends in "%" and is printed times 100.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table '{self.title}': a row has {len(row)} cells under {len(self.columns)} columns")
        object.__setattr__(self, "rows", tuple(tuple(_clean(cell) for cell in row) for row in self.rows))

    @classmethod
    def of(cls, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], note: str = "") -> Table:
        """From any sequences, lists included."""
        return cls(title, tuple(columns), tuple(tuple(row) for row in rows), note)


@dataclass(frozen=True)
class Series:
    """One line of a chart: points in order of x. A y of None (or NaN, stored as None) leaves a gap.

    `smooth`, if not empty, is the trend at the same x; then y is drawn faintly behind it (card_curves.py fills it).
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    smooth: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.smooth) not in (0, len(self.x)):
            raise ValueError(f"series '{self.name}' has {len(self.x)} x values and {len(self.y)} y values")

    @classmethod
    def of(cls, name: str, x: Sequence[float], y: Sequence[float | None]) -> Series:
        return cls(name, tuple(float(v) for v in x), tuple(_finite(v) for v in y))


@dataclass(frozen=True)
class Reference:
    """A horizontal line to compare a chart with: a target, a baseline, chance."""

    label: str
    value: float


@dataclass(frozen=True)
class Curve:
    """A line chart. `zoom` cuts the y axis to where the lines spend their time (a loss starts far above).

    A `minor` one is folded away at first.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    references: tuple[Reference, ...] = ()
    note: str = ""
    zoom: bool = False
    minor: bool = False


@dataclass(frozen=True)
class Bars:
    """Grouped bars: `values[s][g]` is the value of series s in group g; None where there is none.

    With unit "%" the values are fractions.
    """

    title: str
    unit: str
    groups: tuple[str, ...]
    series: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    note: str = ""
    highlight: str | None = None  # the series that is ours; the others are drawn quieter

    def __post_init__(self) -> None:
        shape_holds = len(self.values) == len(self.series)
        if not shape_holds or any(len(line) != len(self.groups) for line in self.values):
            raise ValueError(
                f"bars '{self.title}': expected {len(self.series)} series of {len(self.groups)} values each"
            )

    @classmethod
    def of(
        cls,
        title: str,
        unit: str,
        groups: Sequence[str],
        values: Mapping[str, Sequence[float | None]],
        *,
        note: str = "",
        highlight: str | None = None,
    ) -> Bars:
        """`values` maps the name of a series to its value in every group."""
        lines = tuple(tuple(_finite(v) for v in line) for line in values.values())
        return cls(title, unit, tuple(groups), tuple(values), lines, note, highlight)


@dataclass(frozen=True)
class Claim:
    """A figure and the threshold it was meant to meet. `value` None: not measured, hence not reached.

    With unit "%" (that alone) both are fractions and are printed times 100.
    `reached` is computed; giving another answer than the value does is refused.
    """

    text: str
    value: float | None
    comparison: Comparison
    threshold: float
    unit: str = ""
    note: str = ""

    reached: bool | None = None

    def __post_init__(self) -> None:
        if self.comparison not in _HOLDS:
            raise ValueError(f"claim '{self.text}': '{self.comparison}' is none of {', '.join(_HOLDS)}")
        object.__setattr__(self, "value", _finite(self.value))
        holds = self.value is not None and _HOLDS[self.comparison](self.value, self.threshold)
        if self.reached not in (None, holds):
            raise ValueError(f"claim '{self.text}' says reached={self.reached}, but its value says {holds}")
        object.__setattr__(self, "reached", holds)


@dataclass(frozen=True)
class Answer:
    """What one stage said. `ended` is false where it ran out of tokens, None where it is not asked to end."""

    stage: str
    text: str
    ended: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One prompt and the answers to it; the card joins the samples of all stages that share a prompt."""

    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Licence:
    """One data source as it was used, and its terms."""

    source: str
    licence: str
    documents: int | None = None
    num_bytes: int | None = None
    used_for: str = ""


@dataclass(frozen=True)
class StageReport:
    """All that one stage says on the card. `headline` stands in the ring; `parameters` counts its model's."""

    stage: str
    headline: Fact | None = None
    summary: str = ""
    parameters: int | None = None
    facts: tuple[Fact, ...] = ()
    claims: tuple[Claim, ...] = ()
    bars: tuple[Bars, ...] = ()
    curves: tuple[Curve, ...] = ()
    tables: tuple[Table, ...] = ()
    samples: tuple[Sample, ...] = ()
    licences: tuple[Licence, ...] = ()


def write_report(path: Path, report: StageReport) -> None:
    """Write `report.json`, whole or not at all."""
    write_json(path, to_json(report))


def read_report(path: Path) -> StageReport:
    """Raises `RunError` naming the file if it is missing, not JSON, or not a report; a claim whose `reached` is not
    what its value says counts as altered."""
    try:
        return from_json(StageReport, json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not a stage report: {error}; delete it and run the stage again") from error


def _finite(value: float | None) -> float | None:
    """JSON has no NaN; a figure that is not a number is a missing one."""
    return float(value) if value is not None and math.isfinite(value) else None


def _clean(value: CellT) -> CellT | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
