"""`fledge complete RUN[:STAGE] "text"`: continue a text."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from fledge.commands.speaking import (
    Speaker,
    add_engine_arguments,
    add_speaking_arguments,
    load_speaker,
    printable,
    sampling_params,
)
from fledge.commands.typed import standard_input
from fledge.errors import UserError
from fledge.types import Completion, SamplingParams


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("complete", help="continue a text")
    parser.add_argument("model", metavar="RUN[:STAGE]", help="a run, a stage of one, or a checkpoint folder")
    parser.add_argument("text", help="what to continue; - reads standard input")
    parser.add_argument("-n", type=int, default=1, dest="num", help="how many (default: %(default)s)")
    add_speaking_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object a completion")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; `UserError` for a model, a text or a number that cannot be used."""
    if args.num < 1:
        raise UserError(f"-n {args.num}: expected 1 or more")
    text = standard_input() if args.text == "-" else args.text
    speaker = load_speaker(args.model, args.runs, args.draft, compiled=args.compile)
    prompt, params = speaker.text_prompt(text), sampling_params(args, speaker)
    if args.num == 1 and not args.as_json:
        _print_stream(text, speaker, prompt, params)
        return 0
    for number, completion in enumerate(speaker.generate([prompt] * args.num, params, continues=True)):
        if args.as_json:
            print(json.dumps(_as_json(text, completion, replace(params, seed=params.seed + number))))
        else:
            print(f"--- {number + 1} of {args.num}\n{printable(text + completion.text)}")
    return 0


def _print_stream(text: str, speaker: Speaker, prompt: tuple[int, ...], params: SamplingParams) -> None:
    events = speaker.stream(prompt, params, continues=True)  # refuses before anything is printed
    print(printable(text), end="", flush=True)
    for event in events:
        print(printable(event.text), end="", flush=True)
    print()


def _as_json(text: str, completion: Completion, params: SamplingParams) -> dict[str, Any]:
    """`logprobs` are natural, under the distribution each token was drawn from."""
    return {
        "prompt": text,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "ids": list(completion.ids),
        "logprobs": list(completion.logprobs),
        "seed": params.seed,
    }
