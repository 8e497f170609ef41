"""What chat, complete and compare share: a model that is asked, how long it reads and writes, and its options.

Everything runs in float32, on the GPU if there is one.
"""

from __future__ import annotations

import argparse
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fledge.errors import RunError, UserError
from fledge.formats.checkpoint import LoadedModel
from fledge.infer.engine import Engine, EngineConfig
from fledge.infer.hosted import load_draft
from fledge.infer.quantize import load_model
from fledge.infer.speculate import USUAL_DRAFT
from fledge.recipes.measure import context_of
from fledge.recipes.runs import resolve_model
from fledge.registry import family
from fledge.text.chat import Renderer, normalise
from fledge.train.device import default_device
from fledge.types import Completion, Conversation, Request, SamplingParams, TokenEvent

MAX_ANSWER_TOKENS = 256  # where nobody asked for a length and the context leaves room
# A little colder than training's 1: small models wander. Both values are customary for chat.
TEMPERATURE, TOP_P = 0.8, 0.95
MAX_PROMPT_CHARS = 4_000_000  # many times what CACHE_BYTES has room for: a mistake, whose encoding takes much memory
COMPILE_HELP = (
    "decode by compiled code, at up to half the time a token for small models; starting takes some seconds more, the "
    "first time on a machine up to minutes"
)
CACHE_BYTES = 256 << 20  # of keys and values: room for 11,000 positions of SmolLM2-135M in float32


@dataclass(frozen=True)
class Speaker:
    """A model to ask. `context` is the number of tokens it learned to read at once; None if nothing says so."""

    name: str
    loaded: LoadedModel
    context: int | None
    engine: Engine

    def answer_tokens(self, asked: int | None) -> int:
        """How long an answer may become: as asked, else half of the context but not more than MAX_ANSWER_TOKENS."""
        if asked is not None:
            return asked
        return MAX_ANSWER_TOKENS if self.context is None else max(1, min(MAX_ANSWER_TOKENS, self.context // 2))

    def chat_prompt(self, conversation: Conversation, max_tokens: int) -> tuple[int, ...]:
        """The ids that ask for the next answer, without the oldest exchanges if all do not fit (`within`)."""
        _refuse_endless(sum(len(message.text) for message in conversation.messages))
        room = None if self.context is None else self.context - max_tokens
        return within(self.loaded.renderer, conversation, room, max_tokens)

    def text_prompt(self, text: str) -> tuple[int, ...]:
        """The ids of the beginning of a document; `UserError` if there is nothing in it."""
        if not text:
            raise UserError("the text to continue is empty; give at least one character")
        _refuse_endless(len(text))
        tokenizer = self.loaded.tokenizer
        return (*self.loaded.soft_ids, tokenizer.end_of_text_id, *tokenizer.encode(text))

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, continues: bool = False
    ) -> list[Completion]:
        """One completion a prompt; the i-th draws with seed `params.seed + i`. `UserError` if the model is damaged.

        `continues`: they go on with the prompts' texts (`types.Request`).
        """
        asked = [
            self._request(prompt, replace(params, seed=params.seed + i), str(i), continues)
            for i, prompt in enumerate(prompts)
        ]
        completions = [completion for (completion,) in self.engine.generate(asked)]
        for completion in completions:
            _refuse_damaged(completion.finish_reason, len(completion.ids))
        return completions

    def stream(self, prompt: Sequence[int], params: SamplingParams, *, continues: bool = False) -> Iterator[TokenEvent]:
        """One completion as it comes; the same as `generate`'s for the same seed. Leaving it early ends the answer.

        Errors as for `generate`, those about the prompt at the call.
        """
        request = self._request(prompt, params, "stream", continues)
        self.engine.submit(request)
        return self._events(request.id)

    def _events(self, request_id: str) -> Iterator[TokenEvent]:
        try:
            while self.engine.has_work:
                for number, event in enumerate(self.engine.step()):
                    _refuse_damaged(event.finish_reason, number)
                    yield event
        finally:
            self.engine.cancel(request_id)
            self.engine.step()

    def _request(self, prompt: Sequence[int], params: SamplingParams, request_id: str, continues: bool) -> Request:
        stops = self.loaded.renderer.stop_ids
        return Request(request_id, tuple(prompt), params, stop_ids=stops, continues=continues)


def _refuse_endless(num_chars: int) -> None:
    if num_chars > MAX_PROMPT_CHARS:
        raise UserError(f"a text of {num_chars:,} characters is more than any model here reads; shorten it")


def _refuse_damaged(reason: str | None, position: int) -> None:
    if reason == "error":
        raise UserError(
            f"the model's prediction for token {position} is not a number; its weights are damaged, raise it again"
        )


def load_speaker(name: str, runs: Path, draft: str | None = None, *, compiled: bool = False) -> Speaker:
    """The model of `RUN`, `RUN:STAGE` or a checkpoint folder. `UserError` if there is none, or none that speaks.

    `draft` names a smaller model in the same ways, which guesses ahead for it (infer/speculate.py). `compiled`
    decodes by compiled code (infer/decoding.py).
    """
    directory = resolve_model(name, runs)
    loaded = load_model(directory, device=default_device(), with_soft_prompt=True)
    if family(loaded.info.family).kind != "causal":
        raise RunError(f"{directory}: a {loaded.info.family} model gives no answers; name a stage that does")
    model: Any = loaded.model
    config, draft_model = EngineConfig(CACHE_BYTES, compile=compiled), None
    if draft is not None:
        config = replace(config, num_draft=USUAL_DRAFT)
        draft_model = load_draft(resolve_model(draft, runs), loaded.tokenizer, default_device())
    return Speaker(name, loaded, context_of(loaded), Engine(model, loaded.tokenizer, config, draft_model))


def within(renderer: Renderer, conversation: Conversation, room: int | None, max_tokens: int) -> tuple[int, ...]:
    """The prompt of the longest stretch of the conversation that fits into `room` tokens; no limit if None.

    System messages at the head stay; exchanges, each from a user's message to the next, go oldest first.
    `UserError` if the last exchange alone is too long.
    """
    messages = normalise(conversation).messages
    head = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    later = (i for i in range(head + 1, len(messages)) if messages[i].role == "user")
    for start in (head, *later):
        ids = renderer.prompt(Conversation((*messages[:head], *messages[start:])))
        if room is None or len(ids) <= room:
            return ids
    raise UserError(
        f"a message of {len(ids)} tokens leaves no room for an answer of {max_tokens}: the model has {room} for it; "
        "shorten the message or ask for fewer --max-tokens"
    )


def add_speaking_arguments(parser: argparse.ArgumentParser) -> None:
    """How to draw tokens, and where runs are: the same options everywhere."""
    parser.add_argument(
        "--max-tokens",
        type=int,
        help=f"of an answer (default: half of what the model reads, at most {MAX_ANSWER_TOKENS})",
    )
    parser.add_argument(
        "--temperature", type=float, default=TEMPERATURE, help="0 takes the likeliest (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, help="draw from the K likeliest tokens only")
    parser.add_argument(
        "--top-p",
        type=float,
        default=TOP_P,
        help="draw from the likeliest that hold P (default: %(default)s)",
    )
    parser.add_argument("--min-p", type=float, help="drop tokens below P times the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders live (default: %(default)s)")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """What `load_speaker` takes beside the model."""
    parser.add_argument(
        "--draft",
        metavar="MODEL",
        help="a smaller model of the same tokenizer that guesses ahead: faster where it is often right, and the "
        "answers stay the same",
    )
    parser.add_argument("--compile", action="store_true", help=COMPILE_HELP)


def sampling_params(args: argparse.Namespace, speaker: Speaker) -> SamplingParams:
    """What the options say; `UserError` for a number out of range."""
    if not 0 <= args.seed < 2**62:
        raise UserError(f"--seed {args.seed}: expected a number from 0 to 2^62")
    try:
        return SamplingParams(
            max_tokens=speaker.answer_tokens(args.max_tokens),
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            seed=args.seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def printable(text: str) -> str:
    """`text` without control characters but line breaks and tabs: what a model says must not steer a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
