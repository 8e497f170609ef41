"""Charts as SVG text, for the run card: line charts, grouped bars, and the mark of an interval in a table cell.

Pure functions from values (report.py) to a string; no network, no script, no fonts of their own. Colours are CSS
variables (`--s0` ... for lines, `--ink`, `--quiet`, `--line`) that the page defines once for light and once for dark.
Sizes are in the units of the viewBox, drawn to be read at 320 to 420 pixels wide.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fledge.recipes import card_format as say
from fledge.recipes.report import Bars, Curve, Interval, Reference, Series

WIDTH = 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 10.0, 34.0
_HEIGHT = 220.0
_BAR_FONT = 13.0  # a little wider than it is, since `columns_wide` knows no capitals
NUM_COLOURS = 6


@dataclass(frozen=True)
class Axis:
    """A straight map from values [low, high] to pixels [start, stop], with round ticks."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def clipped(self, value: float) -> float:
        return self(min(max(value, self.low), self.high))

    def ticks(self, wanted: int = 5) -> list[float]:
        """Multiples of 1, 2, 2.5 or 5 times a power of ten, within the axis; about `wanted` of them."""
        rough = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def text(value: str) -> str:
    """`value` for use inside SVG or HTML: escaped, without characters that XML forbids."""
    return html.escape(say.printable(value))


def number(value: float) -> str:
    """A coordinate: two decimals are finer than any screen."""
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"


def line_chart(curve: Curve) -> str:
    """`curve` as one `<svg>`; an empty one says so. Lines leave a zoomed chart through its top."""
    points = [(x, y) for s in curve.series for x, y in zip(s.x, s.y, strict=True) if y is not None]
    if not points:
        return _nothing(curve.title)
    y_axis = _axis(_visible(curve), _HEIGHT - _BOTTOM, _TOP, padding=0.06)
    longest = max((len(label) for label in _tick_labels(y_axis.ticks(4))), default=0)
    left = max(_LEFT, 12 + 6.6 * longest)
    x_axis = _axis([x for x, _ in points], left, WIDTH - _RIGHT, padding=0.0)
    is_whole = all(float(x).is_integer() for x, _ in points)
    body = [_grid(x_axis, y_axis, curve, is_whole)]
    shown = [reference for reference in curve.references if _inside(reference.value, y_axis)]
    body += [_reference(reference, x_axis, y_axis) for reference in shown]
    box = f'x="0" y="0" width="{number(WIDTH)}" height="{number(y_axis.start)}"'
    lines = [_line(series, x_axis, y_axis, i % NUM_COLOURS) for i, series in enumerate(curve.series)]
    body.append(f"<svg {box}>{''.join(lines)}</svg>")  # an inner svg cuts off what lies beyond it
    return _svg(WIDTH, _HEIGHT, _described(curve), body)


def bar_chart(bars: Bars) -> str:
    """`bars` as horizontal bars, one block a group, each with its value beside it; the axis starts at 0."""
    shown = [value for line in bars.values for value in line if value is not None]
    if not shown:
        return _nothing(bars.title)
    names = max((say.columns_wide(name) for name in bars.series), default=0.0)
    left = min(140.0, 16.0 + _BAR_FONT * names)
    low, high = min(0.0, *shown), max(0.0, *shown)
    axis = Axis(low, high if high > low else low + 1.0, left, WIDTH - 52.0)
    decimals = 1 if bars.unit == "%" else min(3, say.decimals_for(shown))
    body: list[str] = []
    y = 4.0
    for group, group_name in enumerate(bars.groups):
        body.append(_label(0, y + 13, group_name, "t-strong"))
        y += 20
        for index, name in enumerate(bars.series):
            value = bars.values[index][group]
            body.append(_bar(y, name, value, axis, _tone(bars, index), bars.unit, decimals))
            y += 17
        y += 9
    return _svg(WIDTH, y, f"{bars.title}: bars in {bars.unit} for {', '.join(bars.groups)}", body)


def interval_mark(interval: Interval, low: float, high: float) -> str:
    """A small dot and whisker on the common scale [low, high] of its column, with a tick at `interval.mark`."""
    axis = Axis(low, high if high > low else low + 1.0, 4.0, 116.0)
    side = "i-level"
    if interval.mark is not None and interval.low > interval.mark:
        side = "i-above"
    elif interval.mark is not None and interval.high < interval.mark:
        side = "i-below"
    body = []
    if interval.mark is not None:
        at = number(axis.clipped(interval.mark))
        body.append(f'<line class="i-mark" x1="{at}" x2="{at}" y1="1" y2="17"/>')
    start, stop, dot = (number(axis.clipped(v)) for v in (interval.low, interval.high, interval.value))
    body.append(f'<line class="i-span" x1="{start}" x2="{stop}" y1="9" y2="9"/>')
    body.append(f'<circle class="i-dot" cx="{dot}" cy="9" r="4"/>')
    return f'<svg class="interval {side}" viewBox="0 0 120 18" width="120" height="18" aria-hidden="true">' + (
        "".join(body) + "</svg>"
    )


def _svg(width: float, height: float, description: str, body: Sequence[str]) -> str:
    box = f'viewBox="0 0 {number(width)} {number(height)}"'
    return f'<svg class="chart" {box} role="img" aria-label="{text(description)}">' + "".join(body) + "</svg>"


def _nothing(title: str) -> str:
    return _svg(
        WIDTH,
        60,
        f"{title}: nothing measured",
        [_label(WIDTH / 2, 34, "nothing measured", "t-quiet", "middle")],
    )


def _label(x: float, y: float, value: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{number(x)}" y="{number(y)}" text-anchor="{anchor}">{text(value)}</text>'


def _axis(values: Sequence[float], start: float, stop: float, padding: float) -> Axis:
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    room = (high - low) * padding
    return Axis(low - room, high + room, start, stop)


def _visible(curve: Curve) -> list[float]:
    """The y values that the axis must hold: all of them, or for `zoom` those up to one and a half times the later
    values' reach above their middle, so that the first steps of a loss do not flatten the rest. References if near."""
    values = [y for s in curve.series for y in s.y if y is not None]
    if curve.zoom and len(values) >= 20:
        later = sorted(y for s in curve.series for y in s.y[len(s.y) // 8 :] if y is not None)
        middle, low, high = later[len(later) // 2], later[0], later[-1]
        ceiling = middle + 1.5 * max(high - middle, middle - low)
        values = [y for y in values if y <= ceiling] or values
    low, high = min(values), max(values)
    reach = (high - low) or abs(high) or 1.0
    near = [r.value for r in curve.references if low - reach <= r.value <= high + reach]
    return values + near + [value + 0.15 * reach for value in near]  # room for the label above the line


def _inside(value: float, axis: Axis) -> bool:
    return axis.low <= value <= axis.high


def _grid(x_axis: Axis, y_axis: Axis, curve: Curve, is_whole: bool) -> str:
    """Lines across, labels on both axes; where x counts something (`is_whole`) it has whole ticks only."""
    bottom, left, right = y_axis.start, x_axis.start, x_axis.stop
    parts = []
    y_ticks = y_axis.ticks(4)
    for value, label in zip(y_ticks, _tick_labels(y_ticks), strict=True):
        y = number(y_axis(value))
        parts.append(f'<line class="grid" x1="{number(left)}" x2="{number(right)}" y1="{y}" y2="{y}"/>')
        parts.append(_label(left - 6, y_axis(value) + 3.5, label, "t-tick", "end"))
    x_ticks = [tick for tick in x_axis.ticks(4) if not is_whole or tick == round(tick)]
    for value, label in zip(x_ticks, _tick_labels(x_ticks), strict=True):
        anchor = "end" if x_axis(value) > right - 12 else "middle"
        parts.append(_label(x_axis(value), bottom + 14, label, "t-tick", anchor))
    parts.append(f'<line class="axis" x1="{number(left)}" x2="{number(right)}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(_label(right, bottom + 28, curve.x_label, "t-quiet", "end"))
    if curve.y_label:
        parts.append(_label(left, bottom + 28, "↑ " + curve.y_label, "t-quiet"))
    return "".join(parts)


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    if not ticks:
        return []
    largest = max(abs(tick) for tick in ticks)
    if largest >= 10_000:
        return [say.count(tick) for tick in ticks]
    if 0 < largest < 0.001:
        return [f"{tick:.0e}".replace("-", "−").replace("e−0", "e−") if tick else "0" for tick in ticks]
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=largest or 1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(round(step, decimals) - step) > step * 1e-6:
        decimals += 1  # steps of 2.5
    return [say.figure(tick + 0.0, decimals) for tick in ticks]


def _reference(reference: Reference, x_axis: Axis, y_axis: Axis) -> str:
    y = y_axis(reference.value)
    ends = f'x1="{number(x_axis.start)}" x2="{number(x_axis.stop)}" y1="{number(y)}" y2="{number(y)}"'
    line = f'<line class="reference" {ends}/>'
    return line + _label(WIDTH - _RIGHT, y - 4, reference.label, "t-reference", "end")


def _line(series: Series, x_axis: Axis, y_axis: Axis, colour: int) -> str:
    if len(series.x) == 1 and series.y[0] is not None:
        spot = f'cx="{number(x_axis(series.x[0]))}" cy="{number(y_axis.clipped(series.y[0]))}"'
        return f'<circle class="dot s{colour}" {spot} r="3"/>'
    raw = _path(series.x, series.y, x_axis, y_axis)
    if not series.smooth:
        return f'<path class="line s{colour}" d="{raw}"/>'
    trend = _path(series.x, series.smooth, x_axis, y_axis)
    return f'<path class="raw s{colour}" d="{raw}"/><path class="line s{colour}" d="{trend}"/>'


def _path(xs: Sequence[float], ys: Sequence[float | None], x_axis: Axis, y_axis: Axis) -> str:
    """A path that lifts the pen at every gap."""
    steps: list[str] = []
    pen_down = False
    for x, y in zip(xs, ys, strict=True):
        if y is None:
            pen_down = False
            continue
        steps.append(f"{'L' if pen_down else 'M'}{number(x_axis(x))} {number(y_axis(y))}")
        pen_down = True
    return "".join(steps)


def _tone(bars: Bars, index: int) -> str:
    if bars.highlight is None:
        return f"s{index % NUM_COLOURS}"
    return "s0" if bars.series[index] == bars.highlight else "muted"


def _bar(y: float, name: str, value: float | None, axis: Axis, tone: str, unit: str, decimals: int) -> str:
    room = (axis.start - 14) / _BAR_FONT
    parts = [_label(axis.start - 8, y + 10.5, say.shorten(name, room), "t-bar", "end")]
    if value is None:
        return parts[0] + _label(axis.start, y + 10.5, say.NOTHING, "t-bar")
    start, stop = sorted((axis(0.0), axis(value)))
    width = number(max(stop - start, 1.0))
    parts.append(f'<rect class="bar {tone}" x="{number(start)}" y="{number(y)}" width="{width}" height="13" rx="2"/>')
    shown = say.percent(value) + " %" if unit == "%" else say.figure(float(value), decimals)
    parts.append(_label(stop + 6, y + 10.5, shown, "t-value"))
    return "".join(parts)


def _described(curve: Curve) -> str:
    """What a screen reader says: the title, and where each line starts and ends."""
    parts = []
    for series in curve.series:
        known = [y for y in series.y if y is not None]
        if known:
            parts.append(f"{series.name} from {say.figure(known[0])} to {say.figure(known[-1])}")
    return f"{curve.title}, {curve.y_label or 'value'} by {curve.x_label}: " + "; ".join(parts)
