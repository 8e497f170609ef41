"""The runner: from a plan of spans to the hidden states of the positions that are wanted. Holds the cache's tensors.

One step of the engine is one forward pass over all new tokens of all sequences, side by side in one row
(sequence.StepPlan). Everything that depends on a token is worked out for all of them at once with numpy; Python loops
only over sequences. What the model sees of it is an attention context (paged.py).

Shapes: T new tokens, N spans, M blocks of a table, Q tokens that attend one by one, W positions wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fledge.errors import UserError
from fledge.infer.causal import CausalModel, device_of, evaluating
from fledge.infer.decoding import MAX_ROWS, CompiledDecoder
from fledge.infer.paged import Chunk, Layout, PagedContext, Pages, SiteShape
from fledge.infer.sequence import Live, Span
from fledge.layers.attention import RowContext

Ints = NDArray[np.int64]

# Spans of so few tokens (a decoding sequence with its draft, a short rest of a prompt) are run as that many single
# queries, together with those that decode.
SHORT_SPAN = 8


class _Probe(RowContext):
    """A context that notes the shape of every site."""

    def __init__(self, tokens_BT: Tensor) -> None:
        super().__init__(tokens_BT)
        self.sites: dict[int, SiteShape] = {}

    def attend(self, site: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, **options: Any) -> Tensor:
        assert site not in self.sites, f"site {site} attends twice in one pass"
        dtype = k_BTGK.dtype
        self.sites[site] = SiteShape(k_BTGK.shape[2], k_BTGK.shape[3], v_BTGK.shape[3], dtype, dtype)
        return super().attend(site, q_BTHK, k_BTGK, v_BTGK, **options)


def probe_sites(model: CausalModel, kept_dtype: torch.dtype | None = None) -> dict[int, SiteShape]:
    """The shape of every attention site, found by running one token.

    Keys and values are to be kept as `kept_dtype`; None keeps them as they are computed.
    """
    with evaluating(model):
        tokens_11 = torch.zeros(1, 1, dtype=torch.int64, device=device_of(model))
        probe = _Probe(tokens_11)
        model.hidden(model.embed(tokens_11, probe), probe)
    if kept_dtype is None:
        return probe.sites
    return {site: replace(shape, kept_dtype=kept_dtype) for site, shape in probe.sites.items()}


def count_blocks(sites: dict[int, SiteShape], block_size: int, num_bytes: int) -> int:
    """How many blocks `num_bytes` of memory hold. `UserError` if not even one."""
    token_bytes = torch.int64.itemsize
    block_bytes = block_size * (sum(shape.num_bytes for shape in sites.values()) + token_bytes)
    if num_bytes < 2 * block_bytes:  # one is kept for padding
        raise UserError(
            f"a cache of {num_bytes} bytes does not hold a block of {block_size} positions, which takes {block_bytes}; "
            "give the engine more cache memory"
        )
    return num_bytes // block_bytes - 1


def in_running_order(spans: Sequence[Span]) -> list[Span]:
    """Those whose tokens attend one by one come first; otherwise as they were."""
    return sorted(spans, key=lambda span: span.count > SHORT_SPAN)


class _Places(NamedTuple):
    """Where the tokens of some spans stand: `firsts` and `counts` by span, the others as in `paged.Layout`."""

    counts: Ints
    firsts: Ints
    rows_T: Ints
    positions_T: Ints
    tables_NM: Ints
    tokens_T: Ints


class Runner:
    """Runs a model over spans. `pages` belongs to it alone, and so does `decoder`, compiled code if there is any."""

    def __init__(self, model: CausalModel, pages: Pages, decoder: CompiledDecoder | None = None) -> None:
        self.model, self.pages, self._decoder = model, pages, decoder
        self._tables = _Tables()

    def run(self, spans: Sequence[Span], num_wanted: Sequence[int]) -> list[Tensor]:
        """The hidden states x_WD of the last `num_wanted[i]` positions of span i, span after span, for `unembed`.

        The spans stand `in_running_order`. To be run within `evaluating`. Writes their keys and values to the pages.
        """
        x_TD = self.states(spans)
        ends = accumulate(span.count for span in spans)
        return [x_TD[end - wanted : end] for end, wanted in zip(ends, num_wanted, strict=True)]

    def states(self, spans: Sequence[Span]) -> Tensor:
        """As `run`: the hidden states x_TD of all positions, span after span."""
        layout, tokens_1T = self._lay_out(spans)
        context = PagedContext(self.pages, layout, tokens_1T)
        return self.model.hidden(self.model.embed(tokens_1T, context), context)[0]

    def decode(self, spans: Sequence[Span]) -> Tensor | None:
        """logits_TV after every token of the spans by compiled code, as `run` and `unembed` would give them; None if
        there is no such code for spans so large. To be run within `evaluating`."""
        if self._decoder is None or sum(span.count for span in spans) > MAX_ROWS:
            return None
        at = self._place(spans)
        return self._decoder.run(at.tokens_T, at.positions_T, at.tables_NM[at.rows_T])

    def forget(self, live: Live) -> None:
        """The sequence has ended."""
        self._tables.forget(live)

    def _place(self, spans: Sequence[Span]) -> _Places:
        starts, counts = (np.array([getattr(span, name) for span in spans]) for name in ("start", "count"))
        firsts = np.cumsum(counts) - counts
        rows_T = np.repeat(np.arange(len(spans)), counts)
        return _Places(
            counts=counts,
            firsts=firsts,
            rows_T=rows_T,
            positions_T=np.arange(len(rows_T)) - np.repeat(firsts - starts, counts),
            tables_NM=self._tables.of(spans, self.pages.block_size),
            tokens_T=np.fromiter(chain.from_iterable(map(_tokens_of, spans)), dtype=np.int64, count=len(rows_T)),
        )

    def _lay_out(self, spans: Sequence[Span]) -> tuple[Layout, Tensor]:
        """Where every token of the step stands, and the tokens, (1, T)."""
        size, at = self.pages.block_size, self._place(spans)
        slots_T = at.tables_NM[at.rows_T, at.positions_T // size] * size + at.positions_T % size
        is_short_N = at.counts <= SHORT_SPAN
        num_queries = int(at.counts[is_short_N].sum())
        is_single = num_queries == int(is_short_N.sum())  # then every query has the row of its own number
        tables_QM = at.tables_NM[:num_queries] if is_single else at.tables_NM[at.rows_T[:num_queries]]
        layout = Layout(
            positions_T=self._tensor(at.positions_T),
            slots_T=self._tensor(slots_T),
            rows_T=self._tensor(at.rows_T),
            tables_NM=self._tensor(at.tables_NM),
            tables_QM=self._tensor(tables_QM),
            lengths_Q=self._tensor(at.positions_T[:num_queries] + 1),
            chunks=tuple(
                Chunk(row, int(at.firsts[row]), span.start, span.count)
                for row, span in enumerate(spans)
                if span.count > SHORT_SPAN
            ),
        )
        return layout, self._tensor(at.tokens_T)[None]

    def _tensor(self, array: Ints) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.pages.device.type == "cpu" else tensor.to(self.pages.device, non_blocking=True)


class _Tables:
    """The block tables of running sequences as rows of one array, brought up to date and not built anew."""

    def __init__(self) -> None:
        self._array = np.zeros((0, 0), dtype=np.int64)
        self._rows: dict[int, int] = {}  # live.id -> row
        self._lists: list[list[int]] = []  # by row: the list that was copied there
        self._spare: list[int] = []

    def of(self, spans: Sequence[Span], block_size: int) -> Ints:
        """(N, M): the tables of these spans, filled up with 0."""
        width = max(len(span.live.blocks) for span in spans)
        self._reserve(len(spans), width)
        rows = [self._bring_up(span, block_size) for span in spans]
        return self._array[rows, :width]

    def forget(self, live: Live) -> None:
        row = self._rows.pop(live.id, None)
        if row is not None:
            self._lists[row] = []
            self._spare.append(row)

    def _bring_up(self, span: Span, block_size: int) -> int:
        live = span.live
        row = self._rows.get(live.id)
        if row is None:
            row = self._rows[live.id] = self._spare.pop()
        # A list is only ever added to, or shortened behind what is computed; a sequence that was preempted gets a new
        # one. So what was copied of the same list still holds for the positions before this span.
        known = span.start // block_size if self._lists[row] is live.blocks else 0
        self._array[row, known : len(live.blocks)] = live.blocks[known:]
        self._lists[row] = live.blocks
        return row

    def _reserve(self, num_new: int, width: int) -> None:
        """Room for so many more rows, and for tables so wide."""
        num_rows, held_width = self._array.shape
        more = max(0, num_new - len(self._spare))
        if more == 0 and width <= held_width:
            return
        array = np.zeros((num_rows + more, max(held_width, width + width // 2)), dtype=np.int64)
        array[:num_rows, :held_width] = self._array
        self._array = array
        self._lists += [[] for _ in range(more)]
        self._spare += range(num_rows, num_rows + more)


def _tokens_of(span: Span) -> list[int]:
    own = span.live.tokens[span.start : span.start + span.count - span.num_draft]
    return own + span.live.draft[: span.num_draft] if span.num_draft else own
