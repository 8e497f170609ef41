"""`fledge data`: the corpora fledge can read, and what is in them or in a folder of the user's."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fledge.data import catalogue, multiple_choice
from fledge.data.corpus import Corpus, Ingredient, read_ingredient
from fledge.data.filters import FilterConfig, Sieve
from fledge.data.manifest import NAME
from fledge.data.package import Package, cache_home, fetch
from fledge.data.reading import Drops, Example
from fledge.errors import DataError
from fledge.types import TextExample

SHOWN_CHARS = 1_000  # of each example, unless --full


def add_parser(subparsers: Any) -> None:
    """Add `data` and its actions to the command line."""
    parser = subparsers.add_parser("data", help="the corpora fledge can read, and what is in them")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="the catalogue: name, what, size, licence")
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    listing.set_defaults(action=_list)
    fetching = actions.add_parser("fetch", help="download and verify what sources and benchmarks need")
    fetching.add_argument("names", nargs="+", metavar="NAME", help="a name of the catalogue, or all")
    fetching.add_argument("--json", action="store_true", help="one JSON object a line")
    fetching.set_defaults(action=_fetch)
    showing = actions.add_parser("show", help="print examples of a source, a file, a folder or a corpus")
    _add_source_arguments(showing)
    showing.add_argument("--limit", type=_positive, default=3, help="how many (default: %(default)s)")
    showing.add_argument(
        "--full", action="store_true", help=f"whole examples, not their first {SHOWN_CHARS} characters"
    )
    showing.set_defaults(action=_show)
    counting = actions.add_parser("stats", help="what is kept, held out and dropped, and why")
    _add_source_arguments(counting)
    counting.add_argument("--json", action="store_true", help="as one JSON object")
    counting.set_defaults(action=_stats)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out the action that was named; returns 0, or raises `UserError`."""
    action = args.action
    action(args, Console(soft_wrap=True))
    return 0


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="NAME_OR_PATH", help="a name of the catalogue, or a path")
    parser.add_argument("--skip-bad", action="store_true", help="count what cannot be used instead of refusing it")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")


def _list(args: argparse.Namespace, console: Console) -> None:
    if args.json:
        for row in catalogue.SOURCES:
            console.print_json(data={**vars(row), "package": row.package.name if row.package else None}, indent=None)
        return
    table = Table(
        Column("name", no_wrap=True),
        *("kind", "what", "language"),
        Column("text", justify="right", no_wrap=True),
        "licence",
        box=None,
    )
    for row in catalogue.SOURCES:
        table.add_row(row.name, row.kind, row.what, row.language, f"{row.megabytes:g} MB", row.licence)
    for test in multiple_choice.BENCHMARKS:
        what = f"{test.num_questions:,} questions, {test.num_choices} choices (evaluation only)"
        table.add_row(test.name, "benchmark", what, "en", "", multiple_choice.LICENCE)
    console.print(table)


def _fetch(args: argparse.Namespace, console: Console) -> None:
    known = {row.name: row.package for row in catalogue.SOURCES}
    known |= {test.name: multiple_choice.PACKAGE for test in multiple_choice.BENCHMARKS}
    names = list(known) if args.names == ["all"] else args.names
    for name in names:
        if name not in known:
            raise DataError(f"unknown source '{name}': known are {', '.join(known)}{_nearest(name, known)}")
    done: set[Package] = set()
    for name in names:
        package = known[name]
        if package is None:
            _say_fetched(args, console, name, None)
        elif package not in done:
            done.add(package)
            with console.status(f"fetching {package.name} {package.version}"):
                path = fetch(package, cache_home())
            _say_fetched(args, console, name, path)


def _say_fetched(args: argparse.Namespace, console: Console, name: str, path: Path | None) -> None:
    """`path` is None for what needs no download."""
    if args.json:
        size = None if path is None else path.stat().st_size
        print(json.dumps({"name": name, "file": None if path is None else str(path), "bytes": size}), flush=True)
    elif path is None:
        console.print(f"{name}: nothing to fetch, it is on this machine", markup=False)
    else:
        console.print(f"{name}: {path}, {path.stat().st_size / 1e6:.1f} MB, sha256 verified", markup=False)


def _show(args: argparse.Namespace, console: Console) -> None:
    drops = Drops()
    for example in islice(_examples(args, drops), args.limit):
        origin = example.provenance
        console.print(Text(f"--- {origin.source}, {origin.id} ({origin.licence})", style="bold"))
        text = _as_text(example)
        is_cut = len(text) > SHOWN_CHARS and not args.full
        console.print(Text(text[:SHOWN_CHARS] + (f" [... {len(text):,} characters]" if is_cut else "")))
    _say_drops(drops, console)


def _stats(args: argparse.Namespace, console: Console) -> None:
    path = Path(args.source)
    if (path / NAME).is_file():
        yields = Corpus.open(path, verify=True).yields
    else:
        drops, sieve = Drops(), Sieve(FilterConfig())
        for _ in sieve.sift(args.source, _examples(args, drops)):
            pass
        yields = {name: {**account.to_json(), "unusable": drops.to_json()} for name, account in sieve.yields.items()}
    if args.json:
        console.print(json.dumps(yields, ensure_ascii=False), markup=False, highlight=False)
        return
    for name, account in yields.items():
        console.print(_yield_table(name, account))


def _yield_table(name: str, account: dict[str, Any]) -> Table:
    table = Table(Column(Text(name)), Column("documents", justify="right"), Column("bytes", justify="right"), box=None)
    table.add_row("read", f"{account['read']:,}", "")
    table.add_row("more, from cutting long ones", f"{account['cut']:,}", "")
    for side, count in account["kept"].items():
        table.add_row(f"kept for {side}", f"{count:,}", f"{account['kept_bytes'][side]:,}")
    for reason, count in account["dropped"].items():
        table.add_row(Text(f"dropped: {reason}"), f"{count:,}", "")
    for reason, facts in account["unusable"].items():
        table.add_row(Text(f"not read: {reason} (first: {facts['first']})"), f"{facts['count']:,}", "")
    table.add_row(Text(f"licences: {', '.join(account['licences']) or 'none'}"), "", "")
    return table


def _examples(args: argparse.Namespace, drops: Drops) -> Iterator[Example]:
    """The examples of a named source, of a corpus that fledge wrote, or of the user's path."""
    path = Path(args.source)
    if any(row.name == args.source for row in catalogue.SOURCES):
        ingredient = Ingredient(args.source)
    elif (path / NAME).is_file():
        return Corpus.open(path).examples("all")
    elif path.exists():
        ingredient = Ingredient(path.name, str(path), skip_bad=args.skip_bad)
    else:
        names = [row.name for row in catalogue.SOURCES]
        raise DataError(
            f"'{args.source}' is neither a path nor a source: known sources are {', '.join(names)}"
            f"{_nearest(args.source, names)}"
        )
    return read_ingredient(ingredient, cache=cache_home(), seed=args.seed, drops=drops)


def _as_text(example: Example) -> str:
    if isinstance(example, TextExample):
        return example.text
    return "\n".join(f"{message.role}: {message.text}" for message in example.conversation.messages)


def _say_drops(drops: Drops, console: Console) -> None:
    for reason, facts in drops.to_json().items():
        console.print(f"not read: {facts['count']} x {reason} (first: {facts['first']})", markup=False, style="dim")


def _nearest(name: str, names: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {number}")
    return number
