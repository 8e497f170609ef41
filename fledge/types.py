"""The plain values that flow between stages. Imports neither torch nor anything of ours.

Everything here is a frozen value: made once by one stage, read by the next (docs/architecture.md, "The values that
flow"). Values that hold tensors live in batches.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Role = Literal["system", "user", "assistant", "tool"]
Metrics = dict[str, float]  # names documented in docs/metrics.md


@dataclass(frozen=True)
class TextPart:
    """A stretch of text inside a message; other kinds of part (images) stand beside it."""

    text: str


@dataclass(frozen=True)
class CallPart:
    """A function that the assistant calls: its name and its arguments, a JSON object as text."""

    name: str
    arguments: str
    id: str | None = None

    @property
    def text(self) -> str:
        """The call as a model writes it, in the convention of Hermes and Qwen."""
        name = json.dumps(self.name, ensure_ascii=False)
        return f'<tool_call>\n{{"name": {name}, "arguments": {self.arguments}}}\n</tool_call>'


@dataclass(frozen=True)
class Message:
    """`is_learned` false: an assistant's message that is context only. A tool's message may say which function
    (`name`) and which call (`call_id`) it answers."""

    role: Role
    parts: tuple[TextPart | CallPart, ...]
    is_learned: bool = True
    name: str | None = None
    call_id: str | None = None

    @classmethod
    def of(cls, role: Role, text: str) -> Message:
        return cls(role, (TextPart(text),))

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class Conversation:
    """`tools`: the functions the assistant may call, each a JSON schema as text."""

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()

    @classmethod
    def of(cls, *turns: tuple[Role, str]) -> Conversation:
        return cls(tuple(Message.of(role, text) for role, text in turns))

    def then(self, role: Role, text: str) -> Conversation:
        """This conversation with one more message."""
        return replace(self, messages=(*self.messages, Message.of(role, text)))


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens. `loss_mask[i]` is true where token i is one the assistant must learn to say."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True)
class Piece:
    """A stretch of one document as it is trained on: n+1 tokens give n positions, each predicting the next token.

    `loss_mask[i]` (same length as `ids`) weighs the prediction OF token i; entry 0 is never used.
    """

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.float32]


Row = tuple[Piece, ...]  # pieces packed side by side into one row; they never see each other


class Termination(Enum):
    """Why a parsed assistant message ends where it does."""

    END_OF_TURN = "end_of_turn"
    TRUNCATED = "truncated"


@dataclass(frozen=True)
class Provenance:
    """Where a piece of data comes from: `source` names the corpus, `id` the record in it, `licence` its terms."""

    source: str
    id: str
    licence: str


@dataclass(frozen=True)
class TextExample:
    text: str
    provenance: Provenance


@dataclass(frozen=True)
class ChatExample:
    conversation: Conversation
    provenance: Provenance


@dataclass(frozen=True)
class Judgement:
    """Who judged answers and on what grounds; None where it is not known.

    `confidence` is on the labeler's own scale, `batch` the delivery the label came in, `policy_version` the model that
    answered, `grounds` the principle or rule that was applied, with the version of its constitution.
    """

    kind: Literal["human", "ai", "rule"] = "human"
    labeler: str | None = None
    confidence: float | None = None
    batch: str | None = None
    policy_version: str | None = None
    grounds: str | None = None
    rationale: str | None = None


@dataclass(frozen=True)
class PairExample:
    """Two answers to one prompt, the first one preferred.

    `probability` is that of `chosen` being the better one: below 1 it is a soft target (Bai et al. 2022, section 4.1).
    `margin` says by how much, `scores` are ratings of chosen and rejected, `shown_first` which the labeler saw first.
    """

    prompt: Conversation
    chosen: str
    rejected: str
    provenance: Provenance
    probability: float = 1.0
    margin: float | None = None
    scores: tuple[float, float] | None = None
    judgement: Judgement | None = None
    shown_first: Literal["chosen", "rejected"] | None = None


@dataclass(frozen=True)
class UnpairedExample:
    """One answer and whether it is desirable (KTO, Ethayarajh et al. 2024). `probability` is that of the label."""

    prompt: Conversation
    completion: str
    is_desirable: bool
    provenance: Provenance
    probability: float = 1.0
    judgement: Judgement | None = None


@dataclass(frozen=True)
class PromptExample:
    """A prompt to be answered. `answer` is what a verifier compares with, `task` says which one (verl's data_source);
    `extra` holds further facts, as JSON values."""

    prompt: Conversation
    provenance: Provenance
    answer: str | None = None
    task: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepsExample:
    """An answer in steps, each judged right or wrong (process supervision)."""

    prompt: Conversation
    steps: tuple[str, ...]
    is_right: tuple[bool, ...]
    provenance: Provenance


@dataclass(frozen=True)
class RatedExample:
    """An answer with a rating; InstructGPT's scale goes from 1 to 7 and FeedME keeps the 7s. `flags` are the yes-or-no
    questions that the labeler answered with yes. `maker` says who wrote it ("human", a model)."""

    prompt: Conversation
    completion: str
    rating: float
    provenance: Provenance
    flags: tuple[str, ...] = ()
    maker: str | None = None
    judgement: Judgement | None = None


@dataclass(frozen=True)
class Ranking:
    """K answers to one prompt (InstructGPT, section 3.4). `ranks[k]` is 1 for the best; equal ranks are ties.

    An answer that ran out of tokens has `ended[k]` false and is rendered without an end-of-turn token.
    `makers[k]` says who wrote answer k ("human", "sft", "base", ...). `logprobs[k]` are those of its tokens when they
    were drawn; `shown[k]` is the place, from 1, where the labeler saw it.
    """

    prompt: Conversation
    completions: tuple[str, ...]
    ranks: tuple[int, ...]
    ended: tuple[bool, ...]
    makers: tuple[str, ...]
    provenance: Provenance
    judgement: Judgement | None = None
    logprobs: tuple[tuple[float, ...], ...] | None = None
    shown: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens. `temperature` 0 is greedy; None switches a filter off.

    In this order: `allowed_ids` (all others are out) and `logit_bias` (added to the logit of an id); the penalties;
    the temperature; then top-k, top-p and min-p, each on the renormalised distribution that the one before left.

    `repetition_penalty` divides positive logits and multiplies negative ones of every token seen in prompt or answer
    (Keskar et al. 2019, CTRL, section 4.1); `presence_penalty` is subtracted once from the logit of every token of the
    answer so far, `frequency_penalty` once for each time it was said (OpenAI's definition). Before `min_tokens` tokens
    no stop token is drawn.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_ids: tuple[int, ...] | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        finite = all(math.isfinite(x) for x in (self.presence_penalty, self.frequency_penalty))
        checks: Sequence[tuple[bool, str]] = (
            (self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}"),
            (0 <= self.temperature < float("inf"), f"temperature must be 0 or more, got {self.temperature}"),
            (self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, got {self.top_k}"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}"),
            (self.min_p is None or 0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}"),
            (finite, f"penalties must be finite, got {self.presence_penalty} and {self.frequency_penalty}"),
            (
                0 < self.repetition_penalty < float("inf"),
                f"repetition_penalty must be positive, got {self.repetition_penalty}",
            ),
            (
                not any(math.isnan(bias) for _, bias in self.logit_bias),
                f"logit_bias must hold numbers, got {self.logit_bias}",
            ),
            (
                self.allowed_ids is None or len(self.allowed_ids) > 0,
                "allowed_ids must allow at least one token",
            ),
            (
                0 <= self.min_tokens <= self.max_tokens,
                f"min_tokens must be from 0 to max_tokens {self.max_tokens}, got {self.min_tokens}",
            ),
        )
        for holds, complaint in checks:
            if not holds:
                raise ValueError(complaint)


# "stop": a stop token, a stop string or a finished grammar. "error": the model's prediction was not a number,
# or its grammar met a limit. "content_filter": the server's guard ended it, and the event's text is its refusal.
FinishReason = Literal["stop", "length", "cancelled", "error", "content_filter"]


@dataclass(frozen=True)
class Completion:
    """One generated answer. `ids` includes the stop token if one was drawn; `text` does not, nor a stop string.

    `logprobs[i]` is the natural log-probability of `ids[i]` under the distribution it was drawn from.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like: a JSON schema (as JSON text), any JSON object (`text` unused), a regular
    expression, or a Lark grammar as `llguidance` reads it."""

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    text: str = ""


MAX_ANSWERS = 4096  # of one request: each takes memory before its first token
MAX_ALTERNATIVES = 128  # told of one position: a long prompt has many positions


@dataclass(frozen=True)
class Request:
    """What the engine is asked: `n` answers to one prompt, the best of `best_of` by mean log-probability.

    `id` is the caller's and unique among live requests. Tenants share the engine fairly and never each other's cached
    prefixes. `adapter` names a loaded LoRA adapter. `stop_ids` end an answer and belong to it, `stop` strings end it
    and do not.
    `top_logprobs` k asks for the k likeliest alternatives of every token, `prompt_logprobs` k for the prompt's own
    log-probabilities and k alternatives at each of its positions; 0 asks for the token's own alone. Answer i draws
    with seed `params.seed + i`. `continues`: an answer goes on with the prompt's text, it is no text of its own; so a
    space that it begins with belongs to it, whatever the tokenizer (text/sentencepiece.py).
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    tenant: str = ""
    adapter: str | None = None
    n: int = 1
    best_of: int | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    continues: bool = False

    def __post_init__(self) -> None:
        best_of = self.n if self.best_of is None else self.best_of
        checks: Sequence[tuple[bool, str]] = (
            (1 <= self.n <= best_of, f"n must be from 1 to best_of, got n {self.n} and best_of {best_of}"),
            (best_of <= MAX_ANSWERS, f"a request has at most {MAX_ANSWERS} answers, got {best_of}; send several"),
            (all(self.stop), "a stop string must hold at least one character"),
            (
                all(0 <= (asked or 0) <= MAX_ALTERNATIVES for asked in (self.top_logprobs, self.prompt_logprobs)),
                f"from 0 to {MAX_ALTERNATIVES} alternatives to a token are told, got top_logprobs {self.top_logprobs} "
                f"and prompt_logprobs {self.prompt_logprobs}",
            ),
        )
        for holds, complaint in checks:
            if not holds:
                raise ValueError(complaint)


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one position under the model's own distribution (before bias, penalties,
    temperature and filters): the token's, its rank from 1, and the likeliest alternatives, best first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """One token of answer `index` to request `request_id`.

    `text` is what the token completes: perhaps nothing, never half a character, never part of a stop string.
    `logprob` is that of the distribution it was drawn from; `model` what `top_logprobs` asked for. The last event of
    an answer says why it is the last; one that carries no token (cancelled, error) has `id` -1. The first event of
    answer 0 carries the prompt's log-probabilities if asked for (position 0 has none and is left out) and how many of
    its tokens were found in the cache.
    """

    id: int
    logprob: float
    text: str
    finish_reason: FinishReason | None
    request_id: str = ""
    index: int = 0
    model: TokenLogprobs | None = None
    prompt: tuple[TokenLogprobs, ...] = ()
    num_cached: int = 0
