"""Attention contexts: what a model needs to know about the batch around it, behind one call.

A model never knows whether it trains on packed rows, reads padded prompts or decodes from a cache: it calls
`context.attend(site, q, k, v)` and reads `context.positions_BT`. Each way of attending is one small class here
(or, for caches, in infer/); none has a flag that changes what it is.

Shapes: B rows, T new positions, S all positions attended to, H query heads, G key/value heads (G divides H),
K head width.
"""

from __future__ import annotations

import copy
from typing import Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.errors import UserError

# From this many windows on, attending block by block beats one mask over all positions (window 256, 12 heads of 64, one
# thread, forward and backward: 67 against 80 ms at 3 windows, 168 against 762 ms at 8; but 50 against 38 ms at 2).
BANDED_FROM_WINDOWS = 3


class Context(Protocol):
    """Everything outside the residual stream that a trunk may ask for."""

    @property
    def positions_BT(self) -> Tensor:
        """Position of every token in its own document, from 0; int64."""

    def attend(
        self,
        site: int,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        *,
        window: int | None = None,
        bias: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Causal attention at layer `site` -> y_BTHK.

        `window` w lets a query see itself and the w-1 positions before it. `bias` (H, S-relative: broadcastable to
        (B, H, T, S)) is added to the scores. `scale` defaults to 1/sqrt(K).
        """

    def earlier(self, tokens_BT: Tensor, steps: int, fill: int) -> Tensor:
        """The token `steps` positions before each one in the same document, `fill` where there is none."""


@runtime_checkable
class Droppable(Protocol):
    """A context for training, which can drop attention weights."""

    def dropping(self, probability: float) -> Context:
        """This context with every attention weight dropped with `probability`, the rest scaled up to make up for it."""


def drop_attention(context: Context, probability: float) -> Context:
    """`context` with dropout on its attention weights (Srivastava et al. 2014); itself if `probability` is 0.

    A cache cannot drop: meeting one here means that a model decodes while it is in training mode.
    """
    if probability == 0:
        return context
    assert isinstance(context, Droppable), f"{type(context).__name__} cannot drop attention weights: call model.eval()"
    return context.dropping(probability)


def require_fit(context: Context, max_positions: int | None) -> None:
    """`UserError` naming both lengths if a document of the batch is longer than `max_positions`."""
    num_positions = context.positions_BT.shape[1]
    if max_positions is None or num_positions <= max_positions:
        return  # the usual case costs no look at the tensor
    longest = int(context.positions_BT.max()) + 1
    if longest > max_positions:
        raise UserError(
            f"a sequence of {longest} tokens does not fit a model of {max_positions} positions; "
            "shorten it, or use a model with more"
        )


class RowContext:
    """Rows that hold exactly one document each, from their first position to their last: plain causal training."""

    def __init__(self, tokens_BT: Tensor) -> None:
        num_positions = tokens_BT.shape[1]
        self.positions_BT = torch.arange(num_positions, device=tokens_BT.device).expand_as(tokens_BT)
        self._dropout = 0.0

    def dropping(self, probability: float) -> Self:
        dropped = copy.copy(self)
        dropped._dropout = probability
        return dropped

    def attend(
        self,
        site: int,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        *,
        window: int | None = None,
        bias: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        num_positions = q_BTHK.shape[1]
        if window is not None and window >= num_positions:
            window = None  # it hides nothing
        if window is None and bias is None:
            return _attend(q_BTHK, k_BTGK, v_BTGK, None, scale, self._dropout)
        if window is not None and bias is None and num_positions >= BANDED_FROM_WINDOWS * window:
            segments_BT = torch.zeros_like(self.positions_BT)
            return _attend_banded(q_BTHK, k_BTGK, v_BTGK, segments_BT, window, scale, self._dropout)
        index_T = torch.arange(num_positions, device=q_BTHK.device)
        allowed_TS = _causal(index_T, index_T, window)
        mask = _scores_mask(allowed_TS[None, None], bias, q_BTHK.dtype)
        return _attend(q_BTHK, k_BTGK, v_BTGK, mask, scale, self._dropout)

    def earlier(self, tokens_BT: Tensor, steps: int, fill: int) -> Tensor:
        return F.pad(tokens_BT, (steps, 0), value=fill)[:, : tokens_BT.shape[1]]


class SegmentContext:
    """Rows that hold several documents, or padding on either side: attention never leaves a segment.

    `segments_BT` numbers the documents of a row; equal neighbours belong together, and a document is contiguous.
    Padding (0) attends to padding only, so no row of scores is ever empty and nothing can become NaN.
    """

    def __init__(self, segments_BT: Tensor) -> None:
        num_positions = segments_BT.shape[1]
        index_T = torch.arange(num_positions, device=segments_BT.device)
        is_start_BT = torch.ones_like(segments_BT, dtype=torch.bool)
        is_start_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
        start_BT = torch.where(is_start_BT, index_T, 0).cummax(dim=1).values
        self.segments_BT = segments_BT
        self.positions_BT = index_T - start_BT
        self._index_T = index_T
        self._same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
        self._allowed_B1TS = (self._same_BTS & _causal(index_T, index_T, None))[:, None]
        self._dropout = 0.0

    def dropping(self, probability: float) -> Self:
        dropped = copy.copy(self)
        dropped._dropout = probability
        return dropped

    def attend(
        self,
        site: int,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        *,
        window: int | None = None,
        bias: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        num_positions = q_BTHK.shape[1]
        if window is not None and bias is None and num_positions >= BANDED_FROM_WINDOWS * window:
            return _attend_banded(q_BTHK, k_BTGK, v_BTGK, self.segments_BT, window, scale, self._dropout)
        allowed_B1TS = self._allowed_B1TS
        if window is not None:
            allowed_B1TS = (self._same_BTS & _causal(self._index_T, self._index_T, window))[:, None]
        mask = _scores_mask(allowed_B1TS, bias, q_BTHK.dtype)
        return _attend(q_BTHK, k_BTGK, v_BTGK, mask, scale, self._dropout)

    def earlier(self, tokens_BT: Tensor, steps: int, fill: int) -> Tensor:
        shifted_BT = F.pad(tokens_BT, (steps, 0), value=fill)[:, : tokens_BT.shape[1]]
        return torch.where(self.positions_BT >= steps, shifted_BT, fill)


def _causal(query_T: Tensor, key_S: Tensor, window: int | None) -> Tensor:
    """allowed_TS: key at or before the query and, with a window w, fewer than w positions behind it."""
    distance_TS = query_T[:, None] - key_S[None, :]
    allowed_TS = distance_TS >= 0
    return allowed_TS if window is None else allowed_TS & (distance_TS < window)


def _scores_mask(allowed: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A boolean mask, or `bias` with minus infinity where attention is not allowed."""
    if bias is None:
        return allowed
    return bias.to(dtype).masked_fill(~allowed, float("-inf"))


def _attend(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Tensor | None, scale: float | None, dropout: float
) -> Tensor:
    y_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return y_BHTK.transpose(1, 2)


def _attend_banded(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    segments_BT: Tensor,
    window: int,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Causal attention within a window and a segment, in blocks of `window` positions: time and memory are linear in T.

    A query sees nothing before the block that precedes its own, so every block of W queries meets 2W keys.
    """
    num_rows, num_positions = segments_BT.shape
    filler = -num_positions % window
    # No segment is numbered -1 or -2: what fills up the last block, and what stands before the first, stay apart.
    segments_BNW = F.pad(segments_BT, (0, filler), value=-1).unflatten(1, (-1, window))
    segments_BNS = torch.cat((F.pad(segments_BNW, (0, 0, 1, 0), value=-2)[:, :-1], segments_BNW), dim=2)
    key_S = torch.arange(-window, window, device=segments_BT.device)
    allowed_BNWS = (segments_BNW[..., None] == segments_BNS[:, :, None]) & _causal(key_S[window:], key_S, window)
    q_BNWHK, k_BNWGK, v_BNWGK = (
        F.pad(x, (0, 0, 0, 0, 0, filler)).unflatten(1, (-1, window)) for x in (q_BTHK, k_BTGK, v_BTGK)
    )
    k_BNSGK, v_BNSGK = (torch.cat((F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x), dim=2) for x in (k_BNWGK, v_BNWGK))
    q_NWHK, k_NSGK, v_NSGK = (x.flatten(0, 1) for x in (q_BNWHK, k_BNSGK, v_BNSGK))
    y_NWHK = _attend(q_NWHK, k_NSGK, v_NSGK, allowed_BNWS.flatten(0, 1)[:, None], scale, dropout)
    return y_NWHK.reshape(num_rows, -1, *y_NWHK.shape[2:])[:, :num_positions]
