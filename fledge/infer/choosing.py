"""From the logits of a step to its tokens: every row by its own request's rules, all rows at once.

shaping.py changes the logits of the rows that ask for it, sampling.py draws, and the model's own log-probabilities are
read off before either where they are wanted.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fledge.infer.sampling import draw
from fledge.infer.shaping import Shaper
from fledge.types import SamplingParams, TokenLogprobs


class Row(NamedTuple):
    """One position whose next token is wanted. `ahead` are draft tokens between what is said and this position.

    `allowed` (V,) bool is the grammar's word, None where there is no grammar. `num_top` None: the model's own
    log-probabilities are not wanted.
    """

    params: SamplingParams
    shaper: Shaper
    uniform: float
    ahead: Sequence[int] = ()
    allowed: Tensor | None = None
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
    for place, row in enumerate(rows):
        if row.shaper.has_effect:
            row.shaper.apply(scores_RV[place], row.ahead)
    _hold_to_grammars(scores_RV, [row.allowed for row in rows])
    uniform_R = torch.tensor([row.uniform for row in rows], dtype=torch.float64, device=logits_RV.device)
    tokens_R, logprobs_R = draw(scores_RV, [row.params for row in rows], uniform_R)
    models: list[TokenLogprobs | None] = [None] * len(rows)
    if own_logprobs is not None:
        tops = [rows[place].num_top or 0 for place in asked]
        for place, found in zip(asked, read_logprobs(own_logprobs, tokens_R[asked], tops), strict=True):
            models[place] = found
    return [Choice(*choice) for choice in zip(tokens_R.tolist(), logprobs_R.tolist(), models, strict=True)]


def _hold_to_grammars(scores_RV: Tensor, allowed: Sequence[Tensor | None]) -> None:
    """Put out, in place, what a row's grammar does not allow."""
    held = [(place, own_V) for place, own_V in enumerate(allowed) if own_V is not None]
    if held:
        places = [place for place, _ in held]
        forbidden_HV = ~torch.stack([own_V for _, own_V in held]).to(scores_RV.device)
        scores_RV[places] = scores_RV[places].masked_fill_(forbidden_HV, float("-inf"))


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
