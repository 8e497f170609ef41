"""What `fledge self-instruct` and `fledge constitution` share: their options, and how a report is printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fledge.commands.running import add_run_options


def add_making_arguments(parser: Any) -> None:
    """How the model is asked, where the work goes, and how it is shown: the same options everywhere."""
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the work and its files go")
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of prompts (default: %(default)s)")
    parser.add_argument(
        "--style",
        choices=("auto", "chat", "text"),
        default="auto",
        help="ask the model in its chat template, or have it continue texts (default: as it was trained)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add_run_options(parser)


def show_report(
    args: argparse.Namespace,
    report: Mapping[str, Any],
    files: Mapping[str, Path],
    next_steps: Sequence[tuple[int, str]],
) -> None:
    """The report as a table, the files it is about, and what to do with them; one JSON object where asked for.

    A next step comes with the number of examples there are for it: where there is none, it is not told.
    """
    if args.as_json:
        done = {"event": "done", "report": report, "files": {name: str(path) for name, path in files.items()}}
        print(json.dumps(done, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in report.items():
        for label, shown in _lines(name, value):
            table.add_row(label, shown)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    for name, path in files.items():
        if path.is_file():
            console.print(f"{name}  {path}", markup=False)
    told = [text for examples, text in next_steps if examples > 0]
    for text in told or ["nothing came of it that a model could learn from; the report says why"]:
        console.print(text, markup=False)


def _lines(name: str, value: Any) -> list[tuple[str, str]]:
    """A value as rows of label and figure; the entries of an object one step further in."""
    if not isinstance(value, Mapping):
        return [(name, _figure(value))]
    rows = [row for key, each in value.items() for row in _lines(key, each)]
    return [(name, "" if rows else "none"), *((f"  {label}", shown) for label, shown in rows)]


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "not measured" if value is None else str(value)
