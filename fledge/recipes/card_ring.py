"""The picture of the ring: the stages of a run as a closed chain of arrows, each with its key figure and its cost.

`ring_svg` makes a complete SVG file, for a README or inside the run card; the inner band shows where the time went.
A stage that has not run is drawn as an empty outline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fledge.recipes import card_format as say
from fledge.recipes.charts import number, text

Theme = Literal["inherit", "auto", "light", "dark"]

# Eight hues of one lightness (OKLCH 0.535 and 0.76): white on the first row and near-black on the second row pass
# WCAG AA (4.5:1), and no two neighbours are alike to a colour-blind eye since every segment also carries its number.
STAGE_COLOURS: Mapping[str, tuple[str, ...]] = {
    "light": ("#a5541e", "#89670f", "#4b7d2b", "#048064", "#137a8e", "#356eb4", "#735cad", "#9e4c7e"),
    "dark": ("#ec9b6d", "#d3ab54", "#91c276", "#59c9a6", "#44c3df", "#7eb4f9", "#b6a2f3", "#e593c2"),
}
_INKS: Mapping[str, Mapping[str, str]] = {
    "light": {"paper": "#fcfbf8", "ink": "#1c1b19", "quiet": "#63605a", "line": "#dcd8cf", "on": "#ffffff"},
    "dark": {"paper": "#151518", "ink": "#f0eee9", "quiet": "#a8a49c", "line": "#3a3a40", "on": "#151518"},
}
FONTS = (
    "ui-sans-serif,system-ui,'Segoe UI',Roboto,'Noto Sans','Noto Sans CJK SC','PingFang SC',"
    "'Microsoft YaHei',sans-serif"
)

_RADIUS, _THICK = 190.0, 46.0
_BAND_RADIUS, _BAND_THICK = 148.0, 7.0


@dataclass(frozen=True)
class Stop:
    """One stage in the ring. `label`, `figure` and `unit` are its headline; `lines` (cost first) stand below it."""

    title: str
    label: str
    figure: str
    unit: str
    lines: tuple[str, ...]
    seconds: float
    has_run: bool


@dataclass(frozen=True)
class Centre:
    """What stands in the middle: the model's name, then a few short lines."""

    title: str
    lines: tuple[str, ...]


def ring_svg(centre: Centre, stops: Sequence[Stop], *, theme: Theme = "auto", labelled: bool = True) -> str:
    """One self-contained `<svg>` with its own style; "auto" follows the reader's light or dark setting,
    "inherit" leaves the colours to the page around it (`theme_variables`).

    Without labels it is square, for narrow screens, and only numbers the stages.
    """
    width, height = (1040.0, 600.0) if labelled else (480.0, 480.0)
    middle = (width / 2, height / 2)
    body = [_arrow(middle, index, len(stops), stop) for index, stop in enumerate(stops)]
    body.append(_band(middle, stops))
    body.append(_middle(middle, centre))
    if labelled:
        body += [_label(middle, index, len(stops), stop) for index, stop in enumerate(stops)]
    told = "; ".join(f"{stop.title}: {stop.label} {stop.figure} {stop.unit}".rstrip() for stop in stops)
    return (
        f'<svg class="ring" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {number(width)} {number(height)}" '
        f'role="img" aria-label="{text(f"The ring of {centre.title}. {told}")}">'
        f"<style>{_style(theme)}</style>{''.join(body)}</svg>"
    )


def theme_variables(theme: Literal["light", "dark"]) -> str:
    """The CSS variables that every drawing and the page use: `--c0` ... for stages, and the inks."""
    inks = "".join(f"--{name}:{value};" for name, value in _INKS[theme].items())
    return inks + "".join(f"--c{i}:{colour};" for i, colour in enumerate(STAGE_COLOURS[theme]))


def _style(theme: Theme) -> str:
    if theme == "auto":
        variables = (
            f".ring{{{theme_variables('light')}}}"
            f"@media(prefers-color-scheme:dark){{.ring{{{theme_variables('dark')}}}}}"
        )
    elif theme == "inherit":
        variables = ""
    else:
        variables = f".ring{{{theme_variables(theme)}}}"
    return variables + (
        f".ring text{{font-family:{FONTS};fill:var(--ink)}}.ring .r-quiet{{fill:var(--quiet);font-size:14px}}"
        ".ring .r-title{font-size:16px;font-weight:600}.ring .r-figure{font-size:25px;font-weight:700}"
        ".ring .r-unit{font-size:14px;font-weight:400;fill:var(--quiet)}.ring .r-name{font-size:33px;font-weight:750}"
        ".ring .r-number{font-size:19px;font-weight:700;fill:var(--on)}.ring .r-leader{stroke:var(--quiet);"
        "stroke-width:1;fill:none;opacity:.55}.ring .r-empty{fill:none;stroke:var(--quiet);stroke-dasharray:4 4}"
        ".ring .r-empty-number{fill:var(--quiet);font-size:19px;font-weight:700}"
    )


def _point(middle: tuple[float, float], radius: float, degrees: float) -> str:
    angle = math.radians(degrees)
    return f"{number(middle[0] + radius * math.cos(angle))} {number(middle[1] + radius * math.sin(angle))}"


def _angles(index: int, count: int) -> tuple[float, float]:
    """Where segment `index` starts and stops: clockwise in degrees, the first one right of the top."""
    step = 360 / count
    start = -90 + index * step
    return start, start + step


def _arrow(middle: tuple[float, float], index: int, count: int, stop: Stop) -> str:
    """An annular segment with a pointed head and a notched tail, so that the chain shows its direction."""
    start, end = _angles(index, count)
    gap, head = 1.2, 7.0
    start, end = start + gap - head / 2, end - gap - head / 2
    inner, outer = _RADIUS - _THICK / 2, _RADIUS + _THICK / 2
    shape = (
        f"M{_point(middle, outer, start)}A{number(outer)} {number(outer)} 0 0 1 {_point(middle, outer, end)}"
        f"L{_point(middle, _RADIUS, end + head)}L{_point(middle, inner, end)}"
        f"A{number(inner)} {number(inner)} 0 0 0 {_point(middle, inner, start)}"
        f"L{_point(middle, _RADIUS, start + head)}Z"
    )
    style = f'style="fill:var(--c{index % 8})"' if stop.has_run else 'class="r-empty"'
    x, y = _point(middle, _RADIUS, (start + end) / 2 + head / 2 + 1).split()
    numeral = "r-number" if stop.has_run else "r-empty-number"
    return (
        f'<path {style} d="{shape}"/><text class="{numeral}" x="{x}" y="{number(float(y) + 6.5)}" '
        f'text-anchor="middle">{index + 1}</text>'
    )


def _band(middle: tuple[float, float], stops: Sequence[Stop]) -> str:
    """The thin inner band: every stage's share of all the seconds, in its colour."""
    total = sum(stop.seconds for stop in stops)
    if total <= 0:
        return ""
    parts = []
    at = -90.0
    for index, stop in enumerate(stops):
        sweep = 359.999 * stop.seconds / total
        if sweep > 0.4:
            start, end = (
                _point(middle, _BAND_RADIUS, at + 0.3),
                _point(middle, _BAND_RADIUS, at + sweep - 0.1),
            )
            arc = f"A{_BAND_RADIUS} {_BAND_RADIUS} 0 {int(sweep > 180)} 1 {end}"
            share = f"{stop.title}: {say.percent(stop.seconds / total)} % of the time"
            parts.append(
                f'<path fill="none" style="stroke:var(--c{index % 8})" stroke-width="{_BAND_THICK}" '
                f'd="M{start}{arc}"><title>{text(share)}</title></path>'
            )
        at += sweep
    return "".join(parts)


def _middle(middle: tuple[float, float], centre: Centre) -> str:
    x, y = middle[0], middle[1] - 11.0 * len(centre.lines) + 4
    at = f'x="{number(x)}" text-anchor="middle"'
    parts = [f'<text class="r-name" {at} y="{number(y)}">{_cut(centre.title, 7.5)}</text>']
    for index, line in enumerate(centre.lines):
        below = number(y + 27 + 22 * index)
        parts.append(f'<text class="r-quiet" {at} y="{below}">{_cut(line, 16)}</text>')
    return "".join(parts)


def _label(middle: tuple[float, float], index: int, count: int, stop: Stop) -> str:
    """Title, key figure and cost beside the segment, joined to it by a leader."""
    start, end = _angles(index, count)
    degrees = (start + end) / 2
    angle = math.radians(degrees)
    side = 1 if math.cos(angle) >= 0 else -1
    anchor = "start" if side > 0 else "end"
    elbow_radius = _RADIUS + _THICK / 2 + 26
    x = middle[0] + elbow_radius * math.cos(angle) + side * 24
    y = middle[1] + elbow_radius * math.sin(angle)
    near, elbow = _point(middle, _RADIUS + _THICK / 2 + 5, degrees), _point(middle, elbow_radius, degrees)
    at = f'x="{number(x + 8 * side)}" text-anchor="{anchor}"'
    room = ((2 * middle[0] - x) if side > 0 else x) - 16
    shown = say.shorten(stop.figure, max(4.0, room / 25))
    unit = say.shorten(stop.unit, max(2.0, (room - 25 * say.columns_wide(shown)) / 14))
    label = say.shorten(stop.label, max(0.0, (room - 16.5 * say.columns_wide(stop.title) - 8) / 13))
    below = [
        f'<text class="r-quiet" {at} y="{number(y + 30 + 19 * row)}">{_cut(line, room / 14)}</text>'
        for row, line in enumerate(stop.lines)
    ]
    return (
        f'<path class="r-leader" d="M{near}L{elbow}L{number(x)} {number(y)}"/>'
        f'<text class="r-title" {at} y="{number(y - 18)}">{text(stop.title)}'
        f'<tspan class="r-unit" dx="8">{text(label)}</tspan></text>'
        f'<text class="r-figure" {at} y="{number(y + 9)}">{text(shown)}'
        f'<tspan class="r-unit" dx="6">{text(unit)}</tspan></text>'
        f"{''.join(below)}"
    )


def _cut(value: str, width: float) -> str:
    return text(say.shorten(value, width))
