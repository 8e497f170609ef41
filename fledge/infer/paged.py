"""The paged key/value cache: an attention context over blocks that many sequences share.

Implements `layers.attention.Context` for one step of the engine: the new tokens of many sequences stand side by side
in one row, (1, T), each with a position of its own. Their keys and values are written to blocks, and every one attends
to the blocks of its own sequence (Kwon et al. 2023, PagedAttention). Made by runner.py; which block belongs to whom is
decided by blocks.py and scheduler.py.

Shapes: T new tokens of the step, of which the first Q attend one by one and the others as chunks; N sequences,
M blocks of a table, P positions of a block; S positions attended to, H query heads, G key/value heads, R = H/G, K head
width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.infer import kernels
from fledge.layers.attention import RowContext


@dataclass(frozen=True)
class SiteShape:
    """What one position of one attention site takes: G keys and values of their widths, computed as `dtype` and kept
    as `kept_dtype`."""

    num_groups: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    kept_dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.num_groups * (self.key_width + self.value_width) * self.kept_dtype.itemsize


class Pages:
    """The memory of the cache: keys and values of every site, (num_blocks + 1, P, G, K), and the tokens they are of.

    The last block belongs to nobody: what pads a step to a fixed size is written there. `attend` is what single
    queries attend with: the C++ kernel where it can be had, else `attend_pages`.
    """

    def __init__(self, sites: Mapping[int, SiteShape], num_blocks: int, block_size: int, device: torch.device) -> None:
        self.num_blocks, self.block_size, self.device = num_blocks, block_size, device
        rows = (num_blocks + 1, block_size)
        self.keys = {
            site: torch.empty(*rows, shape.num_groups, shape.key_width, dtype=shape.kept_dtype, device=device)
            for site, shape in sites.items()
        }
        self.values = {
            site: torch.empty(*rows, shape.num_groups, shape.value_width, dtype=shape.kept_dtype, device=device)
            for site, shape in sites.items()
        }
        self.attend = _best_attention(sites, device)
        self.tokens = torch.zeros(rows[0] * rows[1], dtype=torch.int64, device=device)  # by slot: block * P + offset


@dataclass(frozen=True)
class Chunk:
    """Positions `start` to `start + count - 1` of the sequence in row `row` of the tables; its tokens are the step's
    `first` onwards."""

    row: int
    first: int
    start: int
    count: int


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a step stand. All tensors int64.

    The first Q tokens, whose tables are `tables_QM`, are queries on their own and see `lengths_Q` positions; the
    others belong to `chunks`, in order. Token t is of the sequence in row `rows_T[t]` of `tables_NM`, at position
    `positions_T[t]`, and its keys go to slot `slots_T[t]`.
    """

    positions_T: Tensor
    slots_T: Tensor
    rows_T: Tensor
    tables_NM: Tensor
    tables_QM: Tensor
    lengths_Q: Tensor
    chunks: tuple[Chunk, ...]


class PagedContext:
    """One step over `pages`. Sees what earlier steps wrote there; nothing here can be differentiated through."""

    def __init__(self, pages: Pages, layout: Layout, tokens_1T: Tensor) -> None:
        self.positions_BT = layout.positions_T[None]
        self._pages, self._layout = pages, layout
        pages.tokens.index_copy_(0, layout.slots_T, tokens_1T[0])

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
        """See `layers.attention.Context`; B is 1. A `bias` is (1, H, T, S), each of them perhaps 1: entry (t, s) is for
        token t of the step and position s of its own sequence, and S is the longest sequence of the step."""
        layout, keys, values = self._layout, self._pages.keys[site], self._pages.values[site]
        k_BTGK, v_BTGK = _as_kept(k_BTGK, keys.dtype), _as_kept(v_BTGK, values.dtype)
        keys.flatten(0, 1).index_copy_(0, layout.slots_T, k_BTGK[0])
        values.flatten(0, 1).index_copy_(0, layout.slots_T, v_BTGK[0])
        scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
        num_queries = layout.lengths_Q.shape[0]
        parts = []
        if num_queries:
            q_QHK = q_BTHK[0, :num_queries]
            if bias is None:
                parts.append(self._pages.attend(q_QHK, keys, values, layout.tables_QM, layout.lengths_Q, scale, window))
            else:
                parts.append(self._attend_biased(q_QHK, site, window, bias, scale))
        for chunk in layout.chunks:
            own = slice(chunk.first, chunk.first + chunk.count)
            own_bias = None if bias is None else _of_tokens(bias, own)[..., : chunk.start + chunk.count]
            new = q_BTHK[:, own], k_BTGK[:, own].to(q_BTHK.dtype), v_BTGK[:, own].to(q_BTHK.dtype)
            if chunk.start == 0:  # it sees nothing but itself, as it will stand in the pages
                whole = RowContext(layout.positions_T[None, own])
                parts.append(whole.attend(site, *new, window=window, bias=own_bias, scale=scale)[0])
            else:
                parts.append(self._attend_chunk(chunk, new[0], site, window, own_bias, scale))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def earlier(self, tokens_BT: Tensor, steps: int, fill: int) -> Tensor:
        """See `layers.attention.Context`. `tokens_BT` must be the step's."""
        layout, size = self._layout, self._pages.block_size
        assert tokens_BT.shape == self.positions_BT.shape, "the tokens must be those of the step"
        before_T = layout.positions_T - steps
        known_T = before_T.clamp(min=0)
        slots_T = layout.tables_NM[layout.rows_T, known_T // size] * size + known_T % size
        return torch.where(before_T >= 0, self._pages.tokens[slots_T], fill)[None]

    def _attend_biased(self, q_QHK: Tensor, site: int, window: int | None, bias: Tensor, scale: float) -> Tensor:
        """`attend_pages` with a bias on the scores."""
        layout, keys, values = self._layout, self._pages.keys[site], self._pages.values[site]
        k_QSGK, v_QSGK, mask_Q11S = _gather(keys, values, layout.tables_QM, layout.lengths_Q, window)
        num_queries, num_heads, _ = q_QHK.shape
        bias_QHS = _of_tokens(bias, slice(0, num_queries))[0].transpose(0, 1)
        if bias_QHS.shape[2] > 1:  # blocks are whole: their width may be more or less than what the bias covers
            num_seen = k_QSGK.shape[1]
            bias_QHS = F.pad(bias_QHS[..., :num_seen], (0, max(0, num_seen - bias_QHS.shape[2])))
        bias_QGRS = bias_QHS.expand(-1, num_heads, -1).unflatten(1, (k_QSGK.shape[2], -1))
        return _attend_rows(q_QHK, k_QSGK, v_QSGK, (mask_Q11S + bias_QGRS).to(q_QHK.dtype), scale)

    def _attend_chunk(
        self, chunk: Chunk, q_1THK: Tensor, site: int, window: int | None, bias: Tensor | None, scale: float
    ) -> Tensor:
        """The chunk's queries over all positions of its sequence that any of them sees -> y_THK."""
        size, end = self._pages.block_size, chunk.start + chunk.count
        first = 0 if window is None else max(0, chunk.start + 1 - window) // size * size
        table_M = self._layout.tables_NM[chunk.row, first // size : -(-end // size)]
        k_SGK, v_SGK = (
            pages[site][table_M].flatten(0, 1)[: end - first].to(q_1THK.dtype)
            for pages in (self._pages.keys, self._pages.values)
        )
        query_T1 = torch.arange(chunk.start, end, device=q_1THK.device)[:, None]
        key_S = torch.arange(first, end, device=q_1THK.device)
        allowed_TS = key_S <= query_T1
        if window is not None:
            allowed_TS &= key_S > query_T1 - window
        mask = allowed_TS
        if bias is not None:
            seen = bias if bias.shape[-1] == 1 else bias[..., first:end]
            mask = seen.to(q_1THK.dtype).masked_fill(~allowed_TS, float("-inf"))
        y_1HTK = F.scaled_dot_product_attention(
            q_1THK.transpose(1, 2),
            k_SGK.transpose(0, 1)[None],
            v_SGK.transpose(0, 1)[None],
            attn_mask=mask,
            scale=scale,
            enable_gqa=q_1THK.shape[2] != k_SGK.shape[1],
        )
        return y_1HTK[0].transpose(0, 1)


def _as_kept(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What the pages keep of keys or values; what half precision cannot hold becomes the most it can, not infinity."""
    if x.dtype == dtype:
        return x
    limits = torch.finfo(dtype)
    return x.clamp(limits.min, limits.max).to(dtype)


class AttendPages(Protocol):
    """`attend_pages`, however it is done."""

    def __call__(
        self,
        q_QHK: Tensor,
        keys: Tensor,
        values: Tensor,
        tables_QM: Tensor,
        lengths_Q: Tensor,
        scale: float,
        window: int | None,
        /,
    ) -> Tensor: ...


def _best_attention(sites: Mapping[int, SiteShape], device: torch.device) -> AttendPages:
    is_known = all(
        shape.dtype == torch.float32 and shape.kept_dtype in (torch.float32, torch.float16) for shape in sites.values()
    )
    if device.type == "cpu" and is_known and kernels.load().is_compiled:
        return kernels.paged_attention
    return attend_pages


def attend_pages(
    q_QHK: Tensor,
    keys: Tensor,
    values: Tensor,
    tables_QM: Tensor,
    lengths_Q: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """One query a row over the first `lengths_Q` positions of its own blocks -> y_QHK.

    `keys` and `values` are (blocks, P, G, K); entry (q, m) of `tables_QM` is the block that holds positions m x P
    onwards. With a `window` w only the last w of the positions are seen. Lengths are at least 1. What stands in blocks
    after a row's length is never looked at, be it NaN.
    """
    k_QSGK, v_QSGK, mask_Q11S = _gather(keys, values, tables_QM, lengths_Q, window)
    return _attend_rows(q_QHK, k_QSGK, v_QSGK, mask_Q11S.to(q_QHK.dtype), scale)


def _gather(
    keys: Tensor, values: Tensor, tables_QM: Tensor, lengths_Q: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(k_QSGK, v_QSGK, mask_Q11S): the blocks of every row side by side, and what is added to the scores over them."""
    k_QSGK, v_QSGK = keys[tables_QM].flatten(1, 2), values[tables_QM].flatten(1, 2)
    position_S = torch.arange(k_QSGK.shape[1], device=keys.device)
    is_beyond_QS = position_S >= lengths_Q[:, None]
    # A block's unwritten rest may hold another sequence's NaN, and NaN x 0 is NaN.
    k_QSGK, v_QSGK = (x.masked_fill_(is_beyond_QS[..., None, None], 0.0) for x in (k_QSGK, v_QSGK))
    hidden_QS = is_beyond_QS if window is None else is_beyond_QS | (position_S < lengths_Q[:, None] - window)
    mask_QS = torch.zeros_like(hidden_QS, dtype=torch.float32).masked_fill_(hidden_QS, float("-inf"))
    return k_QSGK, v_QSGK, mask_QS[:, None, None]


def _attend_rows(q_QHK: Tensor, k_QSGK: Tensor, v_QSGK: Tensor, mask: Tensor, scale: float) -> Tensor:
    """y_QHK under a `mask` (Q, G or 1, R or 1, S), added to the scores."""
    num_rows, num_heads, head_width = q_QHK.shape
    num_groups = k_QSGK.shape[2]
    # The R heads that share a key head stand as R queries, so that keys are never repeated.
    y_QGRK = F.scaled_dot_product_attention(
        q_QHK.reshape(num_rows, num_groups, num_heads // num_groups, head_width),
        k_QSGK.transpose(1, 2).to(q_QHK.dtype),
        v_QSGK.transpose(1, 2).to(q_QHK.dtype),
        attn_mask=mask,
        scale=scale,
    )
    return y_QGRK.reshape(num_rows, num_heads, v_QSGK.shape[3])


def _of_tokens(bias: Tensor, own: slice) -> Tensor:
    """The part of a bias (1, H, T, S) that is for these tokens of the step, (1, H, t, S)."""
    bias = bias[(None,) * (4 - bias.ndim)]
    return bias if bias.shape[2] == 1 else bias[:, :, own]
