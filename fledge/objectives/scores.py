"""What ranking and value objectives ask of a model: one number a token. models/scalar.py answers it.

The objectives know this protocol only, so that models and losses stay apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from fledge.layers.attention import Context, SegmentContext
from fledge.objectives.padding import Group, without_padding


class Judge(Protocol):
    """A trunk with one number a token. B rows, T positions."""

    def embed(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """Tokens looked up, as wide as the family likes it."""

    def hidden(self, x: Tensor, context: Context) -> Tensor:
        """Scores (B, T), float32, from what `embed` returned."""


ScoreRegion = Callable[[Judge, Tensor, Tensor], Tensor]


def read_scores(model: Judge, x: Tensor, segments_BT: Tensor) -> Tensor:
    """Scores (B, T) from embedded tokens: the costly region, without sparse gradients, that a caller may compile."""
    return model.hidden(x, SegmentContext(segments_BT))


def token_scores(model: Judge, tokens_BT: Tensor, segments_BT: Tensor, region: ScoreRegion | None = None) -> Tensor:
    """Scores (B, T): by a compiled `region` over whole rows; if None eagerly, without the padding, where they are 0."""
    if region is not None:
        return region(model, model.embed(tokens_BT, SegmentContext(segments_BT)), segments_BT)

    def scores_of(group: Group, segments_bL: Tensor) -> Tensor:
        return read_scores(model, model.embed(group.of(tokens_BT), SegmentContext(segments_bL)), segments_bL)

    return without_padding(scores_of, segments_BT)
