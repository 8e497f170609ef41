"""`fledge eval RUN[:STAGE]`: bits per byte, how the model answers, and multiple choice."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fledge.commands.running import listener_of
from fledge.errors import ConfigError
from fledge.types import Metrics

if TYPE_CHECKING:
    from fledge.recipes.measure import Measured

SHOTS = (0, 1, 5)
GENERATION_ROWS = (
    ("answers", "answers", ".0f"),
    ("share_ended", "answers that end", ".1%"),
    ("share_empty", "empty answers", ".1%"),
    ("share_distinct", "answers unlike all others", ".1%"),
    ("answer_tokens", "tokens an answer", ".1f"),
    ("answer_characters", "characters an answer", ".1f"),
    ("entropy", "entropy, nats a token", ".3f"),
    ("distinct_1", "distinct words of all (tokens)", ".1%"),
    ("distinct_2", "distinct pairs of all", ".1%"),
    ("distinct_3", "distinct triples of all", ".1%"),
)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("eval", help="measure a model")
    parser.add_argument("model", metavar="RUN[:STAGE]", help="a run, a stage of one, or a checkpoint folder")
    parser.add_argument(
        "--source", nargs="+", default=[], metavar="NAME", help="held-out text of these sources instead"
    )
    parser.add_argument(
        "--benchmarks",
        nargs="*",
        metavar="NAME",
        help="multiple choice as well: all benchmarks, or those named",
    )
    parser.add_argument(
        "--shots",
        type=int,
        nargs="+",
        default=list(SHOTS),
        metavar="N",
        help="solved examples shown (default: 0 1 5)",
    )
    parser.add_argument("--limit", type=int, help="documents a source, prompts, and questions a benchmark, at most")
    parser.add_argument("--row-length", type=int, help="tokens read at once (default: as in pretraining)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, answers, examples (default: 0)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders live (default: runs)")
    parser.add_argument("--json", action="store_true", dest="as_json", help="JSON lines on standard output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; `UserError` for a model, a source or a number that cannot be used."""
    from fledge.data.multiple_choice import BENCHMARKS
    from fledge.recipes.measure import MeasureOrder, measure
    from fledge.recipes.runs import resolve_model

    _refuse_below(1, limit=args.limit, row_length=args.row_length)
    _refuse_below(0, shots=min(args.shots), seed=args.seed)
    named = args.benchmarks or [row.name for row in BENCHMARKS]
    order = MeasureOrder(
        sources=tuple(args.source),
        benchmarks=() if args.benchmarks is None else tuple(named),
        shots=tuple(sorted(set(args.shots))),
        limit=args.limit,
        row_length=args.row_length,
        seed=args.seed,
    )
    found = measure(resolve_model(args.model, args.runs), order, listener_of(args))
    if args.as_json:
        print(json.dumps({"event": "result", **as_json(found)}))
    else:
        print_tables(found, Console())
    return 0


def as_json(found: Measured) -> dict[str, Any]:
    """What was measured as one JSON value; docs/metrics.md says what the names mean."""
    scores = {name: {str(shots): row for shots, row in rows.items()} for name, rows in found.benchmarks.items()}
    return {
        "model": str(found.model.directory),
        "stage": found.model.info.stage,
        "hash": found.model.hash,
        "row_length": found.row_length,
        "bits_per_byte": found.bits_per_byte,
        "generation": found.generation,
        "benchmarks": scores,
    }


def print_tables(found: Measured, console: Console) -> None:
    """What was measured, for people; what could not be is said."""
    name = f"[bold]{escape(str(found.model.directory))}[/bold]"
    console.print(f"{name}  {found.model.info.stage}  {found.model.hash[:12]}", soft_wrap=True)
    if found.bits_per_byte:
        _show(console, "bits per byte on held-out text (lower is better)", _language_table(found.bits_per_byte))
    else:
        console.print("\nno held-out text: no bits per byte")
    if found.generation:
        _show(console, "answers to held-out prompts", _generation_table(found.generation))
    else:
        console.print("\nno held-out chats, or a model that only counts: no answers")
    for name, rows in found.benchmarks.items():
        _show(console, f"{name}: accuracy in %, with its 95 % interval", _benchmark_table(rows))


def _show(console: Console, title: str, table: Table) -> None:
    console.print(f"\n[bold]{title}[/bold]", soft_wrap=True)
    console.print(table)


def _language_table(metrics: Metrics) -> Table:
    table = _table("source", "bits per byte", "documents", "bytes")
    suffixes = [name.removeprefix("bits_per_byte") for name in metrics if name.startswith("bits_per_byte")]
    for suffix in sorted(suffixes):
        label = suffix.removeprefix("/").replace("_", " ") or "all"
        bits, documents, size = (metrics[f"{name}{suffix}"] for name in ("bits_per_byte", "documents", "bytes"))
        table.add_row(label, f"{bits:.4f}", f"{documents:,.0f}", f"{size:,.0f}")
    return table


def _generation_table(metrics: Metrics) -> Table:
    table = _table("", "value")
    for name, label, form in GENERATION_ROWS:
        table.add_row(label, format(metrics[name], form))
    return table


def _benchmark_table(rows: Mapping[int, Metrics]) -> Table:
    """Accuracy by the sum of log-likelihoods and by their mean a byte, beside chance."""
    table = _table("shots", "chance", "likelihood", "likelihood a byte", "questions", "cut left")
    for shots, metrics in rows.items():
        cells = [_interval(metrics, key) for key in ("accuracy", "accuracy_per_byte")]
        table.add_row(
            str(shots),
            f"{100 * metrics['chance']:.1f}",
            *cells,
            f"{metrics['questions']:,.0f}",
            f"{metrics['share_truncated']:.0%}",
        )
    return table


def _interval(metrics: Metrics, key: str) -> str:
    value, low, high = (100 * metrics[f"{key}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None, pad_edge=False)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _refuse_below(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
