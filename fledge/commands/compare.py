"""`fledge compare RUN:sft RUN:ppo --prompt ...`: the same prompts, several models, side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fledge.commands.speaking import add_speaking_arguments, load_speaker, printable, sampling_params
from fledge.errors import UserError
from fledge.types import Completion, Conversation


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("compare", help="the same prompts, several models, side by side")
    parser.add_argument("models", nargs="+", metavar="RUN[:STAGE]", help="runs, stages of them, or checkpoint folders")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to ask; may be given several times",
    )
    parser.add_argument("--file", type=Path, help="further prompts, one a line")
    parser.add_argument(
        "--complete", action="store_true", help="continue the prompts as text instead of answering them"
    )
    add_speaking_arguments(parser)
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object a prompt")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; `UserError` for a model, a prompt or a number that cannot be used."""
    prompts = [*args.prompt, *(lines_of(args.file) if args.file else [])]
    if not prompts:
        raise UserError("nothing to ask; give --prompt TEXT or --file FILE")
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty; give at least one character")
    said = [_answers(name, prompts, args) for name in args.models]  # one model in memory at a time
    console = Console()
    for number, prompt in enumerate(prompts):
        row = [completions[number] for completions in said]
        if args.as_json:
            print(json.dumps(_as_json(prompt, args.models, row)))
        else:
            console.print(_table(prompt, args.models, row))
    return 0


def _answers(name: str, prompts: Sequence[str], args: argparse.Namespace) -> list[Completion]:
    speaker = load_speaker(name, args.runs)
    params = sampling_params(args, speaker)
    if args.complete:
        asked = [speaker.text_prompt(prompt) for prompt in prompts]
    else:
        asked = [speaker.chat_prompt(Conversation.of(("user", prompt)), params.max_tokens) for prompt in prompts]
    return speaker.generate(asked, params, continues=args.complete)


def _table(prompt: str, names: Sequence[str], row: Sequence[Completion]) -> Table:
    table = Table(title=Text(printable(prompt)), title_justify="left", title_style="bold", box=box.ROUNDED, expand=True)
    for name in names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(_cell(completion) for completion in row))
    return table


def _cell(completion: Completion) -> Text:
    """The answer, and a mark where it was cut."""
    cell = Text(printable(completion.text))
    return cell if completion.finish_reason == "stop" else cell.append(" …", style="dim")


def _as_json(prompt: str, names: Sequence[str], row: Sequence[Completion]) -> dict[str, Any]:
    answers = [
        {"model": name, "text": c.text, "tokens": len(c.ids), "finish_reason": c.finish_reason}
        for name, c in zip(names, row, strict=True)
    ]
    return {"prompt": prompt, "answers": answers}


def lines_of(path: Path) -> list[str]:
    """The lines of a file that hold something."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from error
    kept = [line for line in lines if line.strip()]
    if not kept:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return kept
