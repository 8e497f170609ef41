"""From the logits of a step to its tokens: every row by its own request's rules, all rows at once.

shaping.py changes the logits of the rows that ask for it, sampling.py draws, and the model's own log-probabilities are
read off before either where they are wanted.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from fledge.infer.sampling import draw
from fledge.infer.shaping import Shaper, apply_mask
from fledge.types import SamplingParams, TokenLogprobs


class Matcher(Protocol):
    """A grammar that follows one answer."""

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete and nothing can follow."""

    def mask(self) -> NDArray[Any]:
        """The tokens that may come next; see `shaping.apply_mask`."""

    def push(self, token_id: int) -> None:
        """The answer goes on with this token, one that the mask allowed."""


@dataclass(frozen=True)
class Row:
    """One position whose next token is wanted. `ahead` are draft tokens between what is said and this position.

    `num_top` None: the model's own log-probabilities are not wanted.
    """

    params: SamplingParams
    shaper: Shaper
    uniform: float
    matcher: Matcher | None = None
    ahead: Sequence[int] = ()
    num_top: int | None = None


class Choice(NamedTuple):
    """The token drawn, its log-probability where it was drawn (NaN: the prediction is no number), the model's own."""

    token: int
    logprob: float
    model: TokenLogprobs | None


def choose(logits_RV: Tensor, rows: Sequence[Row], banned: Tensor) -> list[Choice]:
    """One token a row. `banned` are the ids that nobody draws. May write into `logits_RV`."""
    asked = [place for place, row in enumerate(rows) if row.num_top is not None]
    own_logprobs = logits_RV[asked].float().log_softmax(dim=-1) if asked else None
    scores_RV = logits_RV.float().index_fill_(1, banned, float("-inf"))
    for scores_V, row in zip(scores_RV, rows, strict=True):
        if row.shaper.has_effect:
            row.shaper.apply(scores_V, row.ahead)
        if row.matcher is not None:
            apply_mask(scores_V, row.matcher.mask())
    uniform_R = torch.tensor([row.uniform for row in rows], dtype=torch.float64, device=logits_RV.device)
    tokens_R, logprobs_R = draw(scores_RV, [row.params for row in rows], uniform_R)
    models: list[TokenLogprobs | None] = [None] * len(rows)
    if own_logprobs is not None:
        tops = [rows[place].num_top or 0 for place in asked]
        for place, found in zip(asked, read_logprobs(own_logprobs, tokens_R[asked], tops), strict=True):
            models[place] = found
    return [Choice(*choice) for choice in zip(tokens_R.tolist(), logprobs_R.tolist(), models, strict=True)]


def read_logprobs(logprobs_RV: Tensor, tokens_R: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """What each row's distribution says of its token, with so many of the likeliest tokens (at most V)."""
    own_R1 = logprobs_RV.gather(1, tokens_R[:, None])
    rank_R = (logprobs_RV > own_R1).sum(dim=-1) + 1
    best = logprobs_RV.topk(min(max(num_top), logprobs_RV.shape[1]), dim=-1)
    rows = zip(
        own_R1[:, 0].tolist(),
        rank_R.tolist(),
        best.indices.tolist(),
        best.values.tolist(),
        num_top,
        strict=True,
    )
    return [
        TokenLogprobs(own, rank, tuple(zip(ids[:top], values[:top], strict=True)))
        for own, rank, ids, values, top in rows
    ]
