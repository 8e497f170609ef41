"""Attention from shared blocks against attention over whole rows: the same answers, however a sequence was cut."""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from fledge.infer.paged import PagedContext, Pages, SiteShape, attend_pages
from fledge.infer.runner import Runner
from fledge.infer.sequence import Live, Span
from fledge.layers.attention import RowContext

HEADS, GROUPS, KEY_WIDTH, VALUE_WIDTH, SIZE = 4, 2, 8, 6, 4
LENGTHS = (23, 1, 12, 16, 9)


def new_pages(fill: float = math.nan, kept: torch.dtype = torch.float32) -> Pages:
    site = SiteShape(GROUPS, KEY_WIDTH, VALUE_WIDTH, torch.float32, kept)
    pages = Pages({0: site}, 40, SIZE, torch.device("cpu"))
    for store in (*pages.keys.values(), *pages.values.values()):
        store.fill_(fill)
    return pages


def new_lives(seed: int = 0) -> list[Live]:
    """Sequences whose blocks lie scattered over the memory; the first two blocks of the last two are shared."""
    blocks = np.random.default_rng(seed).permutation(40).tolist()
    lives = []
    for number, length in enumerate(LENGTHS):
        tokens = [100 * number + place for place in range(length)]
        own = [blocks.pop() for _ in range(-(-length // SIZE))]
        lives.append(Live(number, tokens, length, 5, blocks=own))
    lives[4].blocks[:2], lives[4].tokens[:8] = lives[3].blocks[:2], lives[3].tokens[:8]
    return lives


def values_of(lives: list[Live], seed: int = 1) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, KEY_WIDTH), (GROUPS, KEY_WIDTH), (GROUPS, VALUE_WIDTH))
    rows = [tuple(torch.randn(1, len(live.tokens), *shape, generator=generator) for shape in shapes) for live in lives]
    for part in (1, 2):
        rows[4][part][:, :8] = rows[3][part][:, :8]
    return rows


def cut(lives: list[Live], size: int) -> list[list[Span]]:
    """Steps in which every sequence that has some left runs `size` positions, each starting one step later."""
    steps: list[list[Span]] = []
    for number, live in enumerate(lives):
        starts = range(0, len(live.tokens), size)
        for step, start in enumerate(starts, start=number):
            steps += [[] for _ in range(step + 1 - len(steps))]
            steps[step].append(Span(live, start, min(size, len(live.tokens) - start), 0, False))
    return steps


def context_of(runner: Runner, spans: list[Span]) -> tuple[PagedContext, list[Span], Tensor]:
    ordered = sorted(spans, key=lambda span: span.count > 8)
    layout, tokens_1T = runner._lay_out(ordered)
    return PagedContext(runner.pages, layout, tokens_1T), ordered, tokens_1T


def slope_bias(lengths: list[int], positions_T: Tensor) -> Tensor:
    """ALiBi (Press et al. 2022): (1, H, T, S) over the longest sequence of a step."""
    slopes_H = torch.tensor([0.1, 0.5, 1.0, 2.0])
    return -slopes_H[None, :, None, None] * (positions_T[:, None] - torch.arange(max(lengths)))


@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
@pytest.mark.parametrize("how", ["kernel", "plain", "biased"])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
@pytest.mark.parametrize("size", [1, 3, 7, 10, 100])
def test_attention_over_pages_equals_attention_over_the_row(
    size: int, window: int | None, how: str, kept: torch.dtype
) -> None:
    """Over the row as the pages keep it: what a sequence sees of itself does not depend on how it was cut."""
    lives = new_lives()
    rows = values_of(lives)
    with_bias = how == "biased"
    whole = []
    for live, (q, k, v) in zip(lives, rows, strict=True):
        num = len(live.tokens)
        bias = slope_bias([num], torch.arange(num)) if with_bias else None
        k, v = k.to(kept).float(), v.to(kept).float()
        whole.append(RowContext(torch.zeros(1, num)).attend(0, q, k, v, window=window, bias=bias, scale=0.3))
    runner = Runner(None, new_pages(kept=kept))
    if how == "plain":
        runner.pages.attend = attend_pages
    for spans in cut(lives, size):
        context, ordered, _ = context_of(runner, spans)
        q, k, v = (
            torch.cat([rows[span.live.id][part][:, span.start : span.start + span.count] for span in ordered], dim=1)
            for part in range(3)
        )
        lengths = [span.start + span.count for span in ordered]
        bias = slope_bias(lengths, context.positions_BT[0]) if with_bias else None
        y = context.attend(0, q, k, v, window=window, bias=bias, scale=0.3)
        firsts = [0, *accumulate(span.count for span in ordered)]
        for span, first in zip(ordered, firsts, strict=False):
            expected = whole[span.live.id][0, span.start : span.start + span.count]
            torch.testing.assert_close(y[0, first : first + span.count], expected, atol=1e-5, rtol=1e-5)


def test_what_half_precision_cannot_hold_becomes_the_most_it_can() -> None:
    runner = Runner(None, new_pages(kept=torch.float16))
    context, _, _ = context_of(runner, [Span(Live(0, [1, 2], 2, 1, blocks=[0]), 0, 2, 0, False)])
    q, k, v = (
        torch.zeros(1, 2, HEADS, KEY_WIDTH),
        torch.ones(1, 2, GROUPS, KEY_WIDTH),
        torch.ones(1, 2, GROUPS, VALUE_WIDTH),
    )
    y = context.attend(0, q, k * 1e6, v * -1e6)
    assert torch.equal(y, torch.full_like(y, torch.finfo(torch.float16).min))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 3, 10, 100])
def test_earlier_tokens_are_the_sequences_own_across_blocks_and_steps(size: int, steps: int) -> None:
    lives = new_lives()
    runner = Runner(None, new_pages())
    for spans in cut(lives, size):
        context, ordered, tokens_1T = context_of(runner, spans)
        got = context.earlier(tokens_1T, steps, fill=-7)[0].tolist()
        expected = []
        for span in ordered:
            padded = [-7] * steps + span.live.tokens
            expected += padded[span.start : span.start + span.count]
        assert got == expected
        own = [live_token for span in ordered for live_token in span.live.tokens[span.start :][: span.count]]
        assert tokens_1T[0].tolist() == own


def test_positions_count_within_each_sequence() -> None:
    lives = new_lives()
    spans = [Span(lives[0], 8, 12, 0, False), Span(lives[1], 0, 1, 0, True), Span(lives[2], 3, 2, 0, False)]
    context, _, _ = context_of(Runner(None, new_pages()), spans)
    assert context.positions_BT.tolist() == [[0, 3, 4, *range(8, 20)]]


def test_drafts_are_run_after_the_sequences_own_tokens() -> None:
    [live] = new_lives()[:1]
    live.draft = [7, 8, 9]
    live.blocks = [*live.blocks, 39]
    _, _, tokens_1T = context_of(Runner(None, new_pages()), [Span(live, 22, 3, 2, True)])
    assert tokens_1T.tolist() == [[22, 7, 8]]


def test_a_preempted_sequence_is_found_in_its_new_blocks() -> None:
    """Its table is as long as before, but the list is a new one."""
    live = Live(0, list(range(8)), 8, 5, blocks=[3, 4])
    runner = Runner(None, new_pages())
    runner._lay_out([Span(live, 0, 8, 0, True)])
    live.blocks = [8, 9]
    layout, _ = runner._lay_out([Span(live, 7, 1, 0, True)])
    assert layout.slots_T.tolist() == [9 * SIZE + 3]
    assert layout.tables_NM.tolist() == [[8, 9]]


def test_blocks_given_back_after_a_draft_are_not_remembered() -> None:
    live = Live(0, list(range(9)), 8, 5, blocks=[3, 4, 5])
    runner = Runner(None, new_pages())
    runner._lay_out([Span(live, 7, 1, 0, True)])
    del live.blocks[2:]
    live.blocks.append(6)
    layout, _ = runner._lay_out([Span(live, 8, 1, 0, True)])
    assert layout.tables_NM.tolist() == [[3, 4, 6]]


def test_rows_of_tables_are_used_again() -> None:
    runner = Runner(None, new_pages())
    for number in range(50):
        live = Live(number, [1, 2], 2, 5, blocks=[number % 40])
        layout, _ = runner._lay_out([Span(live, 0, 2, 0, True)])
        assert layout.tables_NM.tolist() == [[number % 40]]
        runner.forget(live)
    assert len(runner._tables._lists) <= 2
