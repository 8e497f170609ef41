"""From a `Card` to its HTML page, which needs no network and no script: card.html.j2 beside this file, filled.

Jinja escapes everything; only the drawings of charts.py, card_ring.py and card_lineage.py, which escape what they are
given, go in as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fledge.config import to_json
from fledge.files import write_json, write_text
from fledge.recipes import card_format as say
from fledge.recipes.card import Card, build_card, read_card, ring_picture
from fledge.recipes.card_lineage import lineage_svg, stage_colour
from fledge.recipes.card_ring import FONTS, theme_variables
from fledge.recipes.card_stages import is_alignment, kind_of, stages_of
from fledge.recipes.charts import NUM_COLOURS, bar_chart, interval_mark, line_chart
from fledge.recipes.report import Cell, Interval, Table

OPEN_SAMPLES = 4  # prompts whose answers are unfolded from the start


@dataclass(frozen=True)
class CellView:
    """One table cell as it is shown; `mark` is the drawing of an interval."""

    text: str
    is_number: bool
    mark: Markup | None = None


def write_card(run: Path) -> Path:
    """Write `card.json`, then `card.html` from what that file says; returns the path of the page.

    Raises what `build_card` raises, and `RunError` if the folder cannot be written.
    """
    write_json(run / "card.json", to_json(build_card(run)))
    page = run / "card.html"
    write_text(page, render_html(read_card(run / "card.json")))
    return page


def render_html(card: Card) -> str:
    """The whole page. The same card gives the same page, byte for byte."""
    environment = Environment(
        loader=PackageLoader("fledge.recipes", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "line_chart": lambda curve: Markup(line_chart(curve)),
        "bar_chart": lambda bars: Markup(bar_chart(bars)),
        "cells": table_cells,
        "printable": say.printable,
        "against": say.against,
        "fact": say.fact,
        "figure": say.figure,
        "count": say.count,
        "bytes": say.num_bytes,
        "flops": say.flops,
        "seconds": say.seconds,
        "percent": say.percent,
        "day": say.day,
        "stage_title": lambda name: kind_of(name).title,
        "stage_colour": stage_colour,
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
    }
    numbers = {stage.name: number for stage, number in zip(card.stages, _numbers(card), strict=True)}
    page: str = environment.get_template("card.html.j2").render(
        card=card,
        ring=Markup(ring_picture(card, theme="inherit")),
        small_ring=Markup(ring_picture(card, theme="inherit", labelled=False)),
        lineage=Markup(lineage_svg(card.lineage)),
        numbers=numbers,
        fonts=Markup(FONTS),
        light=Markup(theme_variables("light")),
        dark=Markup(theme_variables("dark")),
        num_colours=NUM_COLOURS,
        open_samples=OPEN_SAMPLES,
        reached=sum(1 for entry in card.claims if entry.claim.reached),
    )
    return say.printable(page)


def table_cells(table: Table) -> list[list[CellView]]:
    """The rows of `table` as text, every column formatted as one; intervals get their mark on a common scale."""
    columns = [_column([row[i] for row in table.rows], title) for i, title in enumerate(table.columns)]
    return [list(row) for row in zip(*columns, strict=True)]


def _column(cells: Sequence[Cell], title: str) -> list[CellView]:
    intervals = [cell for cell in cells if isinstance(cell, Interval)]
    edges = [v for i in intervals for v in (i.low, i.high, i.mark) if v is not None]
    room = 0.08 * (max(edges) - min(edges)) if edges else 0.0
    views = []
    for cell, shown in zip(cells, say.column(cells, title), strict=True):
        is_number = not isinstance(cell, str | bool)
        mark = None
        if isinstance(cell, Interval):
            mark = Markup(interval_mark(cell, min(edges) - room, max(edges) + room))
        views.append(CellView(shown, is_number, mark))
    return views


def _numbers(card: Card) -> list[str]:
    """The place of each stage in the ring ("6"), that of its guests with a letter ("6a"), "+" outside the ring."""
    present = {stage.name for stage in card.stages}
    kinds = [kind for kind in stages_of(card.plan) if not is_alignment(card.plan) or kind.name in present]
    places = [kind.name for kind in kinds if kind.part_of is None]
    guests: dict[str, int] = {}
    numbers = []
    for stage in card.stages:
        host = kind_of(stage.name).part_of
        if host is not None:
            numbers.append(f"{places.index(host) + 1}{'abcdef'[guests.get(host, 0)]}")
            guests[host] = guests.get(host, 0) + 1
        else:
            numbers.append(str(places.index(stage.name) + 1) if stage.name in places else "+")
    return numbers
