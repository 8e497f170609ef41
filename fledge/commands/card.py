"""`fledge card RUN`: make the run card anew, and say in the terminal what is on it."""

from __future__ import annotations

import argparse
import json
import webbrowser
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fledge.config import to_json
from fledge.files import write_text
from fledge.recipes import card_format as say
from fledge.recipes.card import Card, read_card, ring_picture
from fledge.recipes.card_page import write_card
from fledge.recipes.report import Claim
from fledge.recipes.runs import find_run

THEMES: tuple[Literal["light"], Literal["dark"]] = ("light", "dark")
_SIGNS = {"<": "<", "<=": "≤", ">": ">", ">=": "≥"}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("card", help="write and show the card of a run")
    parser.add_argument("name", metavar="RUN", help="a run in the runs folder, or its path")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs live (default: runs)")
    parser.add_argument("--json", action="store_true", help="print the card as JSON instead of a summary")
    parser.add_argument("--picture", type=Path, metavar="DIR", help="write ring-light.svg and ring-dark.svg there")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; `RunError` for a run that is not there or damaged."""
    folder = find_run(args.name, args.runs)
    page = write_card(folder)
    card = read_card(folder / "card.json")
    if args.json:
        print(json.dumps(to_json(card), ensure_ascii=False, allow_nan=False))
    else:
        print_summary(card, page, Console())
    if args.picture is not None:
        for theme in THEMES:
            write_text(args.picture / f"ring-{theme}.svg", ring_picture(card, theme=theme))
    if args.open:
        webbrowser.open(page.resolve().as_uri())
    return 0


def print_summary(card: Card, page: Path, console: Console) -> None:
    """Stages with their key figure and cost, then every target, then where the page is."""
    table = Table(title=_title(card), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("stage", "key figure", "time", "tokens", "memory"):
        table.add_column(name, justify="left" if name in ("stage", "key figure") else "right")
    for stage in card.stages:
        if stage.cost is None:
            table.add_row(stage.title, Text(stage.state, style="dim"))
            continue
        told = stage.report.headline
        headline = "" if told is None else f"{say.fact(told)} {told.unit} ({told.label})"
        tokens = say.count(stage.cost.tokens) if stage.cost.tokens else say.NOTHING
        memory = say.num_bytes(stage.cost.peak_rss_bytes)
        table.add_row(stage.title, Text(headline), say.seconds(stage.cost.seconds), tokens, memory)
    console.print(table)
    if card.claims:
        console.print()
    for entry in card.claims:
        console.print(_claim_line(entry.claim), soft_wrap=True)
    console.print(Text.assemble("\ncard  ", (str(page), "bold")), soft_wrap=True)


def _title(card: Card) -> str:
    parts = [card.name]
    if card.parameters is not None:
        parts.append(f"{say.count(card.parameters)} parameters")
    if card.total.seconds:
        parts.append(f"raised in {say.seconds(card.total.seconds)}")
    return ", ".join(parts)


def _claim_line(claim: Claim) -> Text:
    value, threshold = say.against(claim)
    unit = f" {claim.unit}" if claim.unit else ""
    verdict = ("reached     ", "green") if claim.reached else ("NOT reached ", "bold red")
    measured = value if claim.value is None else f"{value}{unit}"
    return Text.assemble(verdict, f"{claim.text}: {measured} (target {_SIGNS[claim.comparison]} {threshold}{unit})")
