"""`fledge raise RECIPE`: the whole ring, or what is left of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fledge.commands.progress import duration
from fledge.commands.running import add_run_options, listener_of
from fledge.errors import ConfigError

if TYPE_CHECKING:
    from fledge.recipes.estimate import StageEstimate


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("raise", help="raise a model: the whole ring, or go on where it stopped")
    parser.add_argument("recipe", nargs="?", help="pocket, fledgling, ...; see --list")
    parser.add_argument("--list", action="store_true", dest="list_recipes", help="show the recipes and end")
    parser.add_argument("--plan", action="store_true", help="show stages, time, memory and FLOPs; run nothing")
    parser.add_argument("--depth", type=int, help="the one dial: layers; all else follows from it")
    parser.add_argument("--text", type=Path, help="a folder of your own text, code and chats, in any language")
    parser.add_argument("--name", help="name of the run (default: the recipe's)")
    parser.add_argument("--tensorboard", action="store_true", help="write event files as well")
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fledge.recipes.raise_ import RECIPES, Order, plan_of, raise_model

    if args.list_recipes:
        _print_recipes([(recipe.name, recipe.summary) for recipe in RECIPES], as_json=args.as_json)
        return 0
    if args.recipe is None:
        raise ConfigError("which recipe? `fledge raise pocket` is the one to begin with; --list shows all")
    order = Order(
        args.recipe, args.depth, args.text, tuple(args.overrides), args.name, args.runs, tensorboard=args.tensorboard
    )
    if args.plan:
        from fledge.recipes.estimate import estimate

        _print_plan(estimate(plan_of(order)), as_json=args.as_json)
        return 0
    listener = listener_of(args)
    path = raise_model(order, listener)
    if args.as_json:
        print(json.dumps({"event": "done", "run": str(path), "card": str(path / "card.html")}))
    else:
        print(f"raised {path.name}: its card is {path / 'card.html'}; talk with it: fledge chat {path.name}")
    return 0


def _print_recipes(recipes: list[tuple[str, str]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dict(recipes), ensure_ascii=False))
        return
    table = Table("recipe", "what it is", box=None, pad_edge=False)
    for name, summary in recipes:
        table.add_row(name, summary)
    Console().print(table)


def _print_plan(stages: list[StageEstimate], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([stage.__dict__ for stage in stages]))
        return
    table = Table("stage", "work", box=None, pad_edge=False)
    for heading in ("time", "memory", "FLOPs"):
        table.add_column(heading, justify="right")
    for stage in stages:
        flops = f"{stage.flops:.2e}" if stage.flops else ""
        table.add_row(stage.stage, stage.work, duration(stage.seconds), f"{stage.bytes / 2**30:.1f} GiB", flops)
    Console().print(table)
