"""Drawings: axes, lines, bars and intervals of the run card."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.recipes.card_curves import thin
from fledge.recipes.card_ring import STAGE_COLOURS, Centre, Stop, ring_svg
from fledge.recipes.charts import Axis, bar_chart, interval_mark, line_chart
from fledge.recipes.report import Bars, Curve, Interval, Reference, Series

BAD = '<script>"&\x00'


def stop(title: str = "Corpus", *, has_run: bool = True, seconds: float = 1.0) -> Stop:
    return Stop(title, "kept", "1.5", "MB", ("2 s",), seconds, has_run)


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_ticks_lie_on_the_axis_and_are_evenly_spaced_round_numbers(low: float, spread: float) -> None:
    high = low + max(spread, abs(low) * 1e-9)
    ticks = Axis(low, high, 0.0, 100.0).ticks()
    step = (high - low) / 5
    assert 1 <= len(ticks) <= 7
    assert all(low - 1e-6 * step <= tick <= high + 1e-6 * step for tick in ticks)


def test_known_ticks() -> None:
    assert Axis(0.0, 10.0, 0, 1).ticks() == [0, 2, 4, 6, 8, 10]
    assert Axis(0.13, 0.97, 0, 1).ticks(4) == pytest.approx([0.25, 0.5, 0.75])


def test_a_line_lifts_the_pen_where_a_value_is_missing() -> None:
    curve = Curve("c", "step", "y", (Series.of("s", [0, 1, 2, 3], [1.0, math.nan, 2.0, 3.0]),))
    path = re.search(r'class="line s0" d="([^"]*)"', line_chart(curve))
    assert path is not None
    assert path[1].count("M") == 2
    assert path[1].count("L") == 1


def test_the_highest_value_is_drawn_above_the_lowest() -> None:
    curve = Curve("c", "step", "y", (Series.of("s", [0, 1], [0.0, 5.0]),))
    path = re.search(r'd="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', line_chart(curve))
    assert path is not None
    x0, y0, x1, y1 = map(float, path.groups())
    assert x0 < x1
    assert y0 > y1


@pytest.mark.parametrize("values", [[], [None, None], [1.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1e-12, 2e-12], [-1e9, 1e9]])
def test_every_series_makes_a_chart_without_nan(values: list[float | None]) -> None:
    curve = Curve(BAD, BAD, BAD, (Series.of(BAD, list(range(len(values))), values),), (Reference(BAD, 1.0),), zoom=True)
    drawn = line_chart(curve)
    ElementTree.fromstring(drawn)
    assert "nan" not in drawn
    assert "<script>" not in drawn


def test_a_zoomed_chart_shows_the_later_values_apart() -> None:
    falling = [2.0 + 8.0 * math.exp(-step / 10) for step in range(200)]
    wide = line_chart(Curve("c", "x", "y", (Series.of("s", range(200), falling),)))
    zoomed = line_chart(Curve("c", "x", "y", (Series.of("s", range(200), falling),), zoom=True))
    assert ">10" in wide
    assert ">10" not in zoomed.replace(">100", "")


def test_steps_are_counted_in_whole_numbers() -> None:
    drawn = line_chart(Curve("c", "step", "y", (Series.of("s", [1, 2, 3], [10.0, 20.0, 30.0]),)))
    assert ">1.5<" not in drawn
    assert ">2<" in drawn


def test_a_bar_is_as_long_as_its_value() -> None:
    bars = Bars.of("b", "bits", ["g"], {"ours": [1.0], "theirs": [2.0], "missing": [None]}, highlight="ours")
    drawn = bar_chart(bars)
    widths = [float(width) for width in re.findall(r'class="bar [^"]*"[^>]*width="([\d.]+)"', drawn)]
    assert widths[1] == pytest.approx(2 * widths[0], rel=1e-3)
    assert len(widths) == 2
    assert "–" in drawn


@pytest.mark.parametrize(
    ("interval", "side"),
    [
        (Interval(0.6, 0.55, 0.65, 0.5), "i-above"),
        (Interval(0.4, 0.3, 0.45, 0.5), "i-below"),
        (Interval(0.5, 0.45, 0.55, 0.5), "i-level"),
        (Interval(0.9, 0.8, 1.0), "i-level"),
    ],
)
def test_an_interval_says_on_which_side_of_its_mark_it_lies(interval: Interval, side: str) -> None:
    assert side in interval_mark(interval, 0.0, 1.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.integers(10, 400))
def test_thinning_keeps_the_extremes_and_both_ends(values: list[float], limit: int) -> None:
    series = Series.of("s", range(len(values)), values)
    thinned = thin(series, max(40, limit))
    assert len(thinned.x) <= max(40, limit)
    assert max(y for y in thinned.y if y is not None) == float(f"{max(values):.6g}")
    assert min(y for y in thinned.y if y is not None) == float(f"{min(values):.6g}")
    assert (thinned.x[0], thinned.x[-1]) == (0, len(values) - 1)
    assert list(thinned.x) == sorted(thinned.x)


def test_a_single_spike_survives_thinning() -> None:
    values = [math.sin(step / 50) for step in range(5000)]
    values[1234], values[4321] = 9.0, -9.0
    thinned = thin(Series.of("s", range(5000), values))
    assert len(thinned.x) <= 400
    assert dict(zip(thinned.x, thinned.y, strict=True))[1234] == 9.0
    assert dict(zip(thinned.x, thinned.y, strict=True))[4321] == -9.0


def test_the_trend_of_a_straight_line_is_that_line_away_from_its_ends() -> None:
    thinned = thin(Series.of("s", range(101), [2.0 * x for x in range(101)]))
    assert thinned.smooth[10:-10] == pytest.approx(tuple(2.0 * x for x in thinned.x[10:-10]))


def test_a_gap_survives_thinning() -> None:
    values = [1.0] * 500 + [math.nan] * 200 + [2.0] * 500
    thinned = thin(Series.of("s", range(1200), values))
    assert None in thinned.y


@pytest.mark.parametrize("theme", ["auto", "light", "dark", "inherit"])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_ring_is_a_complete_svg_that_fetches_nothing(theme: str, labelled: bool) -> None:
    stops = [stop(BAD), *(stop(f"stage {i}", has_run=i < 5) for i in range(7))]
    drawn = ring_svg(Centre(BAD, (BAD, "二号模型")), stops, theme=theme, labelled=labelled)  # type: ignore[arg-type]
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    links = [value for element in root.iter() for name, value in element.attrib.items() if name.endswith("href")]
    assert links == []
    assert drawn.count('class="r-empty"') == 2


def test_the_band_of_time_has_one_arc_a_stage_that_took_any() -> None:
    drawn = ring_svg(Centre("m", ()), [stop(seconds=9.0), stop(seconds=1.0), stop(seconds=0.0)])
    assert drawn.count("% of the time") == 2
    assert "90.0 % of the time" in drawn


def contrast(first: str, second: str) -> float:
    """WCAG 2.1 contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("theme", "ink"), [("light", "#ffffff"), ("dark", "#151518")])
def test_numbers_on_stage_colours_are_readable(theme: str, ink: str) -> None:
    assert min(contrast(colour, ink) for colour in STAGE_COLOURS[theme]) >= 4.5
