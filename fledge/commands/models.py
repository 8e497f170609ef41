"""`fledge models`: the families and their published sizes."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from fledge.config import to_json
from fledge.models.presets import count_parameters, preset, presets
from fledge.registry import FAMILIES


def add_parser(subparsers: Any) -> None:
    """Add `models` and its actions to the command line."""
    parser = subparsers.add_parser("models", help="the model families and their published sizes")
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    listing = actions.add_parser("list", help="families and sizes (also without an action)")
    for where in (parser, listing):
        where.add_argument("--json", action="store_true", help="one JSON object a line")
        where.set_defaults(run=run, action=_list)
    showing = actions.add_parser("show", help="the config of a published size")
    showing.add_argument("name", metavar="NAME", help="a size, such as gpt2-124m")
    showing.add_argument("--json", action="store_true", help="as one JSON object")
    showing.set_defaults(action=_show)


def run(args: argparse.Namespace) -> int:
    """Carry out the action that was named; returns 0, or raises `UserError`."""
    args.action(args)
    return 0


def _list(args: argparse.Namespace) -> None:
    sizes = {name: (family, config, count_parameters(family, config)) for name, (family, config) in presets().items()}
    if args.json:
        for name, (family, config, count) in sizes.items():
            print(json.dumps({"name": name, "family": family, "parameters": count, "config": to_json(config)}))
        return
    console = Console()
    families = Table("family", Column("year", justify="right"), "paper", Column("file", no_wrap=True), box=None)
    for row in FAMILIES:
        families.add_row(row.name, str(row.year), row.paper, row.module.replace(".", "/") + ".py")
    console.print(families)
    numbers = [Column(name, justify="right") for name in ("parameters", "layers", "width", "heads", "positions")]
    table = Table(Column("size", no_wrap=True), *numbers, box=None)
    for name, (_, config, count) in sizes.items():
        shape = (config.num_layers, config.width, config.num_heads, config.max_positions)
        table.add_row(name, f"{count:,}", *map(str, shape))
    console.print()
    console.print(table)


def _show(args: argparse.Namespace) -> None:
    family, config = preset(args.name)
    count = count_parameters(family, config)
    if args.json:
        print(json.dumps({"name": args.name, "family": family, "parameters": count, "config": to_json(config)}))
        return
    print(f"{args.name}: family {family}, {count:,} parameters")
    for field, value in to_json(config).items():
        print(f"  {field} = {json.dumps(value)}")
