"""Scoring and embedding whole texts: one forward pass a text, as the trainer runs it, without the engine's cache.

`score` uses the trainer's arithmetic (objectives/logprobs.py: float32 cross-entropy), so the two agree; texts of like
length run side by side, padded on the right, where a causal model does not look.

Shapes: B rows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.infer.causal import CausalModel, device_of
from fledge.layers.attention import RowContext

# Positions run at once, padding included; and those whose logits are held at once (x 50,000 float32: 51 MB).
_BATCH_POSITIONS = 4096
_LOGIT_ROWS = 256


def score(model: CausalModel, rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """For every row the natural log-probabilities of its tokens but the first. To be run within `evaluating`."""
    scores: list[list[float]] = [[] for _ in rows]
    for places, x_BTD, tokens_BT in _hidden(model, rows):
        for place, x_TD, tokens_T in zip(places, x_BTD, tokens_BT, strict=True):
            scores[place] = _score_row(model, x_TD, tokens_T[: len(rows[place])])
    return scores


def embed(model: CausalModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """(N, D) float32 on the CPU: the mean of each row's hidden states, scaled to length 1. As `score`."""
    vectors: dict[int, Tensor] = {}
    for places, x_BTD, _ in _hidden(model, rows):
        for place, x_TD in zip(places, x_BTD, strict=True):
            vectors[place] = F.normalize(x_TD[: len(rows[place])].float().mean(dim=0), dim=0).cpu()
    return torch.stack([vectors[place] for place in range(len(rows))]) if rows else torch.zeros(0, 0)


def _score_row(model: CausalModel, x_TD: Tensor, tokens_T: Tensor) -> list[float]:
    scores: list[float] = []
    for start in range(0, len(tokens_T) - 1, _LOGIT_ROWS):
        targets = tokens_T[start + 1 : start + 1 + _LOGIT_ROWS]
        logits = model.unembed(x_TD[None, start : start + len(targets)])[0]
        scores += (-F.cross_entropy(logits.float(), targets, reduction="none")).tolist()
    return scores


def _hidden(model: CausalModel, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(which rows, x_BTD, tokens_BT) batch by batch, the longest first."""
    device = device_of(model)
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    while order:
        width = len(rows[order[0]])
        size = max(1, _BATCH_POSITIONS // width)
        places, order = order[:size], order[size:]
        padded = [[*rows[place], *[0] * (width - len(rows[place]))] for place in places]
        tokens_BT = torch.tensor(padded, device=device)
        context = RowContext(tokens_BT)
        yield places, model.hidden(model.embed(tokens_BT, context), context), tokens_BT
