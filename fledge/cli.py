"""The table of commands. Each command is one file in commands/; its module is imported only when it is called."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fledge import __version__
from fledge.errors import Interrupted, TrainingHalted, UserError, nearest

COMMANDS = (
    ("raise", "raise_", "raise a model: the whole ring, or go on where it stopped"),
    ("align", "align", "align a model: preferences, rewards, demonstrations"),
    ("self-instruct", "self_instruct", "make instructions from seed tasks, by any model"),
    ("constitution", "constitution", "revise answers and label preferences by principle"),
    ("chat", "chat", "talk with a model in the terminal"),
    ("complete", "complete", "continue a text"),
    ("compare", "compare", "the same prompts, several models, side by side"),
    ("judge", "judge", "whose answers a reward model prefers"),
    ("eval", "eval", "measure a model"),
    ("card", "card", "write and show the card of a run"),
    ("data", "data", "the corpora fledge can read, and what is in them"),
    ("tokenizer", "tokenizer", "train, show and measure tokenizers"),
    ("import", "import_", "make a published model one of fledge's"),
    ("export", "export", "write a model for transformers, vLLM or llama.cpp"),
    ("quantize", "quantize", "make a smaller, faster checkpoint of a model"),
    ("models", "models", "the model families and their published sizes"),
    ("serve", "serve", "serve models with OpenAI's API"),
    ("worker", "worker", "run the fine-tuning jobs of a server"),
    ("keys", "keys", "who may use the server"),
    ("moderation", "moderation", "train and show the model behind /v1/moderations"),
)
# Commands whose user waits for every token: there, threads that spin between two operators halve its time.
SPINNING = ("chat", "complete", "serve")
USAGE, INTERRUPTED = 2, 130
FULL = (errno.ENOSPC, errno.EDQUOT)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line like every other error of ours; half an option is none."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 the user's input cannot be used, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if _named(arguments) not in SPINNING:
        # Threads that spin long while they wait make a busy machine ten times slower; libgomp reads this with torch.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    with contextlib.suppress(AttributeError):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?" in its place
    try:
        parsed, unknown = _parser(arguments).parse_known_args(arguments)
        if unknown:
            command = f"fledge {_named(arguments) or ''}".rstrip()
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}; see `{command} --help`")
        code: int = parsed.run(parsed)
        return code
    except UserError as error:
        return _say(f"fledge: {error}", USAGE)
    except TrainingHalted as error:
        return _say(f"fledge: training halted: {error}", 1)
    except (Interrupted, KeyboardInterrupt) as error:
        return _say(f"fledge: {str(error) or 'stopped'}", INTERRUPTED)
    except OSError as error:
        if os.environ.get("FLEDGE_TRACEBACK"):
            raise
        remedy = "; free some space and run the same command again" if error.errno in FULL else ""
        return _say(f"fledge: {error.filename or 'the system'}: {error.strerror or error}{remedy}", USAGE)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands, of which only the one that was named is imported."""
    parser = Parser(prog="fledge", description="Raise a ChatGPT from raw text.")
    parser.add_argument("--version", action="version", version=f"fledge {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    named = _named(arguments)
    _refuse_unknown(named)
    for name, module, summary in COMMANDS:
        if name == named:
            importlib.import_module(f"fledge.commands.{module}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def _named(arguments: Sequence[str]) -> str | None:
    """The command that the user named."""
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def _refuse_unknown(named: str | None) -> None:
    names = [name for name, _, _ in COMMANDS]
    if named is not None and named not in names:
        raise UserError(f"no command '{named}'; {nearest(named, names)}")


def _say(line: str, code: int) -> int:
    print(" ".join(line.split("\n")), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
