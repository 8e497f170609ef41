"""What ranking and value objectives ask of a model: one number a token. models/scalar.py answers it.

The objectives know this protocol only, so that models and losses stay apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from fledge.layers.attention import Context, SegmentContext


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
