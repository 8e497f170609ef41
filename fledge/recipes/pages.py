"""Self-contained HTML pages out of the values of report.py: sections of figures, claims, charts and tables.

The run card (card_page.py), the health page of a reward model and the table of episodes share this look: one file each,
no network, no script but the page's own. Jinja escapes everything; only the drawings, which escape what they are given,
go in as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fledge.recipes import card_format as say
from fledge.recipes.card_lineage import stage_colour
from fledge.recipes.card_ring import FONTS, theme_variables
from fledge.recipes.card_stages import kind_of
from fledge.recipes.charts import NUM_COLOURS, bar_chart, interval_mark, line_chart
from fledge.recipes.report import Bars, Cell, Claim, Curve, Fact, Interval, Table


@dataclass(frozen=True)
class CellView:
    """One table cell as it is shown; `mark` is the drawing of an interval."""

    text: str
    is_number: bool
    mark: Markup | None = None


@dataclass(frozen=True)
class Section:
    """One part of a page, top to bottom: what it asks, figures, claims, charts, tables."""

    name: str
    title: str
    text: str = ""
    facts: tuple[Fact, ...] = ()
    claims: tuple[Claim, ...] = ()
    bars: tuple[Bars, ...] = ()
    curves: tuple[Curve, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Page:
    title: str
    lead: str
    sections: tuple[Section, ...]
    footer: str


def render_page(page: Page) -> str:
    """The whole page. The same values give the same page, byte for byte."""
    text: str = page_environment().get_template("page.html.j2").render(page=page)
    return say.printable(text)


def page_environment() -> Environment:
    """Templates of this folder, with what they call to draw and to write figures."""
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
    environment.globals |= {
        "fonts": Markup(FONTS),
        "light": Markup(theme_variables("light")),
        "dark": Markup(theme_variables("dark")),
        "num_colours": NUM_COLOURS,
    }
    return environment


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
