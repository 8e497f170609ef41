"""`fledge chat RUN[:STAGE]`: talk with a model in the terminal; without one, a line in and an answer out."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fledge.commands.speaking import (
    Speaker,
    add_engine_arguments,
    add_speaking_arguments,
    load_speaker,
    printable,
    sampling_params,
)
from fledge.errors import UserError
from fledge.recipes.runs import SERVED_STAGES, find_run
from fledge.types import Conversation, SamplingParams

HELP = """/reset        forget the conversation
/stage        show the stages of this run that can be talked to
/stage NAME   go on with the model of another stage
/help         show this
/quit         leave; so does Ctrl-D. Ctrl-C stops an answer."""
UNTAUGHT = ("pretrain", "code")  # stages before the model has seen a conversation


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("chat", help="talk with a model in the terminal")
    parser.add_argument("model", metavar="RUN[:STAGE]", help="a run, a stage of one, or a checkpoint folder")
    parser.add_argument("--system", metavar="TEXT", help="a message of the system before the first one")
    add_speaking_arguments(parser)
    add_engine_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when the user leaves or the input ends; `UserError` for a model or a number that cannot be used."""
    chat = Chat(args, load_speaker(args.model, args.runs, args.draft, compiled=args.compile))
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{chat.greeting()}. /help shows what you can type.")
    for line in _typed_lines() if is_terminal else _piped_lines():
        try:
            if not chat.hear(line):
                break
        except UserError as error:
            print(f"fledge: {error}", file=sys.stderr)
    return 0


class Chat:
    """One conversation and the model that it is held with; `/stage` changes the model and keeps the conversation."""

    def __init__(self, args: argparse.Namespace, speaker: Speaker) -> None:
        self._args = args
        self._run, _, _ = args.model.partition(":")
        self._system = Conversation.of(("system", args.system)) if args.system else Conversation(())
        self.conversation = self._system
        self._generator = torch.Generator().manual_seed(args.seed)  # goes on through the conversation
        self._use(speaker, sampling_params(args, speaker))

    def greeting(self) -> str:
        """Who is there, in one line."""
        info, parameters = self.speaker.loaded.info, self.speaker.loaded.model.parameters()
        millions = sum(parameter.numel() for parameter in parameters) / 1e6
        line = f"{self.speaker.name}: {info.family}, {millions:.1f}M parameters, stage {info.stage}"
        if info.stage in UNTAUGHT:
            line += "; it has not learned to chat yet, `fledge complete` shows what it knows"
        return line

    def hear(self, line: str) -> bool:
        """Answer a line, or do what its command says; false if the user leaves. `UserError` changes nothing."""
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self._answer(line)
            return True
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/help":
            print(HELP)
        elif command == "/reset":
            self.conversation = self._system
            print("(forgotten)")
        elif command == "/stage":
            self._stage(rest.strip())
        else:
            raise UserError(f"no command '{command}'; /help shows those there are")
        return True

    def _answer(self, text: str) -> None:
        asked = self.conversation.then("user", text)
        prompt = self.speaker.chat_prompt(asked, self._params.max_tokens)
        said = ""
        try:
            seed = int(torch.randint(2**62, (), generator=self._generator))
            for event in self.speaker.stream(prompt, replace(self._params, seed=seed)):
                said += event.text
                print(printable(event.text), end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print(flush=True)
        self.conversation = asked.then("assistant", said)

    def _stage(self, name: str) -> None:
        if not name:
            print(", ".join(_stages(find_run(self._run, self._args.runs))))
            return
        args = self._args
        speaker = load_speaker(f"{self._run}:{name}", args.runs, args.draft, compiled=args.compile)
        self._use(speaker, sampling_params(self._args, speaker))
        print(self.greeting())

    def _use(self, speaker: Speaker, params: SamplingParams) -> None:
        if speaker.context is not None and params.max_tokens >= speaker.context:
            raise UserError(
                f"--max-tokens {params.max_tokens}: the model reads {speaker.context} tokens at once; "
                "leave it room for the question"
            )
        self.speaker, self._params = speaker, params


def _stages(run_folder: Path) -> list[str]:
    """The stages of a run that have a model to talk to, in the order they were made."""
    return [stage for stage in reversed(SERVED_STAGES) if (run_folder / stage / "model" / "run.json").is_file()]


def _typed_lines() -> Iterator[str]:
    """Lines typed at a prompt until Ctrl-D; Ctrl-C drops the line; bytes that are no UTF-8 become U+FFFD."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a terminal of another encoding is no reason to stop
    with suppress(ImportError):  # not everywhere
        import readline  # noqa: F401  # importing it lets input() edit lines and recall earlier ones

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")


def _piped_lines() -> Iterator[str]:
    """Lines of standard input; bytes that are no UTF-8 become U+FFFD."""
    for line in sys.stdin.buffer:
        yield line.decode(errors="replace")
