"""The dense key/value cache: an attention context that remembers what it has seen.

Implements `layers.attention.Context`, so a model decodes without knowing it. Rows are left-padded to one width and
grow together, one column a position; a row that has ended leaves and the rest go on. Paged memory is the engine's
matter, this is the simple layout that is hard to get wrong.

Shapes: B rows, T new positions, S columns held, H query heads, G key/value heads, R = H/G, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Sight(NamedTuple):
    """The columns from `first` to the last, and what is added to the scores over them (None: nothing)."""

    first: int
    mask: Tensor | None


class CacheContext:
    """Left-padded rows that grow. Before each forward pass call `feed(tokens_BT)` with the tokens it will read.

    `lengths` are the prompts' own lengths; the first feed is as wide as the longest. Memory for keys and values is
    taken when a layer first attends: B x G x capacity x K of each. Nothing here can be differentiated through.
    """

    def __init__(self, lengths: Sequence[int], capacity: int, device: torch.device | None = None) -> None:
        width = max(lengths)
        assert width <= capacity, f"prompts of {width} tokens do not fit into {capacity} columns"
        self.positions_BT = torch.zeros(len(lengths), 0, dtype=torch.int64, device=device)
        self._columns_S = torch.arange(capacity, device=device)
        self._starts = [width - length for length in lengths]  # first real column of every row
        self._starts_B1 = torch.tensor(self._starts, device=device)[:, None]
        self._tokens_BS = torch.zeros(len(lengths), capacity, dtype=torch.int64, device=device)
        self._keys: dict[int, Tensor] = {}  # site -> k_BGSK
        self._values: dict[int, Tensor] = {}
        self._sights: dict[int | None, _Sight] = {}  # window -> what this feed sees through it
        self._padding_B11S: Tensor | None = None
        self._held = 0  # columns of earlier feeds
        self._end = 0  # columns including this feed

    def feed(self, tokens_BT: Tensor) -> None:
        """Announce the next T positions of every row; they attend to everything fed before them."""
        self._held, self._end = self._end, self._end + tokens_BT.shape[1]
        assert self._end <= self._columns_S.shape[0], f"column {self._end} of a cache of {self._columns_S.shape[0]}"
        self._sights.clear()
        self._tokens_BS[:, self._held : self._end] = tokens_BT
        positions_BT = self._columns_S[self._held : self._end] - self._starts_B1
        # Padding is given position 0, so that learned positions can be looked up; nothing attends to it.
        self.positions_BT = positions_BT.clamp_(min=0) if self._held < max(self._starts) else positions_BT

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
        """See `layers.attention.Context`. A `bias` is as wide as the columns held, this feed included, or one wide."""
        sight = self._sights.get(window) or self._look(window, q_BTHK.dtype)
        k_BGSK = self._remember(self._keys, site, k_BTGK, sight.first)
        v_BGSK = self._remember(self._values, site, v_BTGK, sight.first)
        mask = sight.mask
        if bias is not None:
            seen = bias if bias.shape[-1] == 1 else bias[..., sight.first : self._end]
            mask = seen.to(q_BTHK.dtype) if mask is None else mask + seen
        if q_BTHK.shape[1] == 1:
            return _attend_one(q_BTHK, k_BGSK, v_BGSK, mask, scale)
        return _attend_many(q_BTHK, k_BGSK, v_BGSK, mask, scale)

    def earlier(self, tokens_BT: Tensor, steps: int, fill: int) -> Tensor:
        """The token `steps` positions before each one fed. `tokens_BT` must be what was last fed."""
        assert tokens_BT.shape == self.positions_BT.shape, "the tokens must be those that were fed"
        first = self._held - steps
        before_BT = self._tokens_BS[:, max(first, 0) : self._end - steps]
        if first >= max(self._starts):
            return before_BT
        if first < 0:
            before_BT = F.pad(before_BT, (tokens_BT.shape[1] - before_BT.shape[1], 0), value=fill)
        return torch.where(self.positions_BT >= steps, before_BT, fill)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only: old row `rows[i]` becomes row i. Rows that keep their place are not copied."""
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        self._starts = [self._starts[old] for old in rows]
        buffers = [*self._keys.values(), *self._values.values()]
        if moved:
            new, old = torch.tensor(moved, device=self._tokens_BS.device).T
            for buffer_BGSK in buffers:
                buffer_BGSK[new, :, : self._end] = buffer_BGSK[old, :, : self._end]
            for buffer in (self._tokens_BS, self._starts_B1, self._padding_B11S):
                if buffer is not None:
                    buffer[new] = buffer[old]
        num_rows = len(rows)
        self._keys = {site: k_BGSK[:num_rows] for site, k_BGSK in self._keys.items()}
        self._values = {site: v_BGSK[:num_rows] for site, v_BGSK in self._values.items()}
        self._tokens_BS, self._starts_B1 = self._tokens_BS[:num_rows], self._starts_B1[:num_rows]
        if self._padding_B11S is not None:
            self._padding_B11S = self._padding_B11S[:num_rows]

    def _remember(self, store: dict[int, Tensor], site: int, new_BTGK: Tensor, first: int) -> Tensor:
        """Write this feed's columns; all of them from `first` on, (B, G, S, K)."""
        held_BGSK = store.get(site)
        if held_BGSK is None:
            num_rows, _, num_groups, head_width = new_BTGK.shape
            held_BGSK = new_BTGK.new_empty(num_rows, num_groups, self._columns_S.shape[0], head_width)
            store[site] = held_BGSK
        held_BGSK.narrow(2, self._held, self._end - self._held).copy_(new_BTGK.transpose(1, 2))
        return held_BGSK.narrow(2, first, self._end - first)

    def _look(self, window: int | None, dtype: torch.dtype) -> _Sight:
        """What this feed sees through a window, worked out once for all layers that have it."""
        first = 0  # the first feed carries queries in the padding, which look at padding
        if self._held > 0:
            first = min(self._starts)
            if window is not None:
                first = max(first, self._held + 1 - window)
        sight = _Sight(first, self._build_mask(window, first, dtype))
        self._sights[window] = sight
        return sight

    def _build_mask(self, window: int | None, first: int, dtype: torch.dtype) -> Tensor | None:
        """What to add to the scores of columns first..end, (B or 1, 1, T or 1, S); None if nothing is hidden."""
        if self._end - self._held == 1:  # every column in sight is allowed, save padding
            if first >= max(self._starts):
                return None
            if self._padding_B11S is None:
                hidden_BS = self._columns_S < self._starts_B1
                self._padding_B11S = _minus_infinity_where(hidden_BS[:, None, None], dtype)
            return self._padding_B11S[..., first : self._end]
        query_1T = self._columns_S[None, self._held : self._end]
        key_1S = self._columns_S[None, first : self._end]
        hidden_TS = key_1S > query_1T.mT
        if window is not None:
            hidden_TS = hidden_TS | (query_1T.mT - key_1S >= window)
        # Padding sees padding and nothing else does: no row of scores is empty, so nothing becomes NaN.
        padding_query_BT, padding_key_BS = query_1T < self._starts_B1, key_1S < self._starts_B1
        hidden_BTS = hidden_TS | (padding_query_BT[..., None] != padding_key_BS[:, None])
        return _minus_infinity_where(hidden_BTS[:, None], dtype)


def _minus_infinity_where(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _attend_one(q_BTHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """One query a row: the R heads that share a key head stand as R queries, so keys are never repeated."""
    num_rows, _, num_heads, head_width = q_BTHK.shape
    num_groups = k_BGSK.shape[1]
    if mask is not None and mask.shape[1] != 1:  # a bias a head: (B, H, 1, S) -> (B, G, R, S)
        mask = mask.reshape(mask.shape[0], num_groups, num_heads // num_groups, mask.shape[3])
    q_BGRK = q_BTHK.reshape(num_rows, num_groups, num_heads // num_groups, head_width)
    y_BGRK = F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, attn_mask=mask, scale=scale)
    return y_BGRK.reshape(num_rows, 1, num_heads, v_BGSK.shape[3])


def _attend_many(q_BTHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    y_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BGSK,
        v_BGSK,
        attn_mask=mask,
        scale=scale,
        enable_gqa=q_BTHK.shape[2] != k_BGSK.shape[1],
    )
    return y_BHTK.transpose(1, 2)
