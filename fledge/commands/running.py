"""What the commands that carry out a plan share: the options that change it and say how it is shown."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fledge.commands.progress import JsonLines, Lines


def add_run_options(parser: Any) -> None:
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=C", help="replace a leaf")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders live (default: %(default)s)")
    parser.add_argument("--json", action="store_true", dest="as_json", help="events as JSON lines on standard output")


def listener_of(args: argparse.Namespace) -> JsonLines | Lines:
    return JsonLines() if args.as_json else Lines()
