"""`fledge judge RUN:gold A B`: whose answers to held-out prompts a reward model prefers, with its interval."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fledge.commands.compare import lines_of
from fledge.errors import ConfigError, UserError
from fledge.types import Metrics

if TYPE_CHECKING:
    from fledge.recipes.judging import Side, Verdict


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("judge", help="whose answers a reward model prefers")
    parser.add_argument("judge", metavar="RUN:gold", help="a reward model that neither side was trained against")
    parser.add_argument("models", nargs="+", metavar="RUN[:STAGE]", help="the first is set against each of the others")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="ask this; may be repeated")
    parser.add_argument("--file", type=Path, help="prompts, one a line (default: what the judge's run held out)")
    parser.add_argument("--limit", type=int, help="prompts at most")
    parser.add_argument("--max-tokens", type=int, help="of an answer (default: as in the judge's run)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, answers, resamples (default: 0)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders live (default: runs)")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object a comparison")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; `UserError` for a model, a prompt or a number that cannot be used."""
    from fledge.recipes.judging import JudgeOrder, judged

    for name, value, least in (("limit", args.limit, 1), ("max-tokens", args.max_tokens, 1), ("seed", args.seed, 0)):
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: expected {least} or more")
    questions = [*args.prompt, *(lines_of(args.file) if args.file else [])]
    if not all(question.strip() for question in questions):
        raise UserError("a prompt is empty; give at least one character")
    order = JudgeOrder(args.judge, args.models, questions, args.limit, args.max_tokens, args.seed)
    verdicts = judged(order, args.runs)
    if args.as_json:
        for verdict in verdicts:
            print(json.dumps(asdict(verdict)))
    else:
        _print(verdicts, Console())
    return 0


def _print(verdicts: list[Verdict], console: Console) -> None:
    sides = Table("model", "asked as", box=None, pad_edge=False)
    for heading in ("parameters", "in matrices", "score", "characters", "ended"):
        sides.add_column(heading, justify="right")
    for side in (verdicts[0].ours, *(verdict.theirs for verdict in verdicts)):
        sides.add_row(*_row(side))
    console.print(sides)
    wins = Table("against", box=None, pad_edge=False)
    for heading in ("wins %", "at equal length %", "won, tied, lost", "times"):
        wins.add_column(heading, justify="right")
    for verdict in verdicts:
        found = verdict.wins
        counts = ", ".join(f"{found[name]:.0f}" for name in ("wins", "ties", "losses"))
        times = verdict.theirs.matrix_parameters / max(verdict.ours.matrix_parameters, 1)
        rates = [_interval(found, key) for key in ("win_rate", "win_rate_length_controlled")]
        wins.add_row(verdict.theirs.name, *rates, counts, f"{times:.2f}")
    title = f"how often answers of {verdicts[0].ours.name} are preferred (95 % interval); times its size, in matrices"
    console.print(f"\n{title}", markup=False, soft_wrap=True)
    console.print(wins)


def _row(side: Side) -> list[str]:
    sizes = [f"{count / 1e6:.2f}M" for count in (side.parameters, side.matrix_parameters)]
    manners = f"{side.manners['answer_characters']:.0f}", f"{side.manners['share_ended']:.0%}"
    return [side.name, side.asked_as, *sizes, f"{side.score:.3f}", *manners]


def _interval(metrics: Metrics, key: str) -> str:
    value, low, high = (100 * metrics[f"{key}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"
