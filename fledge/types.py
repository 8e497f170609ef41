"""The plain values that flow between stages. Imports neither torch nor anything of ours.

Everything here is a frozen value: made once by one stage, read by the next (docs/architecture.md, "The values that
flow"). Values that hold tensors live in batches.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Role = Literal["system", "user", "assistant", "tool"]
Metrics = dict[str, float]  # names documented in docs/metrics.md


@dataclass(frozen=True)
class TextPart:
    """A stretch of text inside a message; other kinds of part (images) stand beside it."""

    text: str


@dataclass(frozen=True)
class Message:
    role: Role
    parts: tuple[TextPart, ...]

    @classmethod
    def of(cls, role: Role, text: str) -> Message:
        return cls(role, (TextPart(text),))

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, *turns: tuple[Role, str]) -> Conversation:
        return cls(tuple(Message.of(role, text) for role, text in turns))

    def then(self, role: Role, text: str) -> Conversation:
        """This conversation with one more message."""
        return Conversation((*self.messages, Message.of(role, text)))


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
class PairExample:
    """Two answers to one prompt, the first one preferred."""

    prompt: Conversation
    chosen: str
    rejected: str
    provenance: Provenance


@dataclass(frozen=True)
class Ranking:
    """K answers to one prompt (InstructGPT, section 3.4). `ranks[k]` is 1 for the best; equal ranks are ties.

    An answer that ran out of tokens has `ended[k]` false and is rendered without an end-of-turn token.
    `makers[k]` says who wrote answer k ("human", "sft", "base", ...).
    """

    prompt: Conversation
    completions: tuple[str, ...]
    ranks: tuple[int, ...]
    ended: tuple[bool, ...]
    makers: tuple[str, ...]
    provenance: Provenance


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens. `temperature` 0 is greedy; None switches a filter off.

    Filters apply after temperature in the order top-k, top-p, min-p, each on the renormalised distribution that the
    one before left.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks: Sequence[tuple[bool, str]] = (
            (self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}"),
            (0 <= self.temperature < float("inf"), f"temperature must be 0 or more, got {self.temperature}"),
            (self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, got {self.top_k}"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}"),
            (self.min_p is None or 0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}"),
        )
        for holds, complaint in checks:
            if not holds:
                raise ValueError(complaint)


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """One generated answer. `ids` includes the stop token if one was drawn; `text` does not.

    `logprobs[i]` is the natural log-probability of `ids[i]` under the distribution it was drawn from.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
