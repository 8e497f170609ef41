"""`fledge self-instruct MODEL --out FOLDER`: from a few seed tasks to instructions with instances, or what is left."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fledge.commands.making import add_making_arguments, show_report
from fledge.commands.running import listener_of


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("self-instruct", help="make instructions from seed tasks, by any model")
    parser.add_argument("model", metavar="RUN[:STAGE]", help="a run, a stage of one, or a checkpoint folder")
    parser.add_argument("--seeds", type=Path, metavar="PATH", help="seed tasks (default: fledge's own)")
    parser.add_argument("--target", type=int, metavar="N", help="how many instructions to make (default: 1000)")
    parser.add_argument("--skip-bad", action="store_true", help="count seed rows that cannot be used; do not stop")
    add_making_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; `UserError` for a model, seeds or settings that cannot be used."""
    from fledge.config import override
    from fledge.recipes.made_data import load_maker, make_instructions
    from fledge.synth.self_instruct import SelfInstructConfig
    from fledge.train.device import default_device

    target = [] if args.target is None else [f"target={args.target}"]
    given = (f"language={args.language}", f"seed={args.seed}", *target, *args.overrides)
    config = override(SelfInstructConfig(), given)
    maker = load_maker(args.model, args.runs, args.style, default_device())
    report = make_instructions(maker, args.seeds, args.out, config, listener_of(args), skip_bad=args.skip_bad)
    tasks = args.out / "tasks.jsonl"
    then = f"read a sample, then train on them: fledge align sft {args.model} --data {tasks}"
    made = report["tasks"]["with instances"]
    show_report(args, report, {"tasks": tasks, "report": args.out / "report.json"}, [(made, then)])
    return 0
