"""The cache against attention over whole rows: the same answers, however the rows are padded, fed and dropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fledge.infer.cache import CacheContext
from fledge.layers.attention import RowContext

HEADS, GROUPS, HEAD_WIDTH = 4, 2, 8


def queries_keys_values(num_positions: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, num_positions, HEADS, HEAD_WIDTH, generator=generator),
        torch.randn(1, num_positions, GROUPS, HEAD_WIDTH, generator=generator),
        torch.randn(1, num_positions, GROUPS, HEAD_WIDTH, generator=generator),
    )


def padded(rows: list[Tensor], width: int) -> Tensor:
    """Left-padded with large rubbish, which must not matter."""
    return torch.cat([torch.cat((torch.full((1, width - r.shape[1], *r.shape[2:]), 7.0), r), dim=1) for r in rows])


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("feeds", [[9], [4, 1, 1, 1, 1, 1], [4, 3, 2], [5, 1, 3]])
def test_attention_from_the_cache_equals_attention_over_the_row(feeds: list[int], window: int | None) -> None:
    num_new = 9 - feeds[0]
    lengths = [feeds[0], 1, feeds[0] - 2]
    rows = [queries_keys_values(length + num_new, seed) for seed, length in enumerate(lengths)]
    expected = [RowContext(torch.zeros(1, k.shape[1])).attend(0, q, k, v, window=window, scale=0.3) for q, k, v in rows]
    q, k, v = (padded([row[part] for row in rows], 9) for part in range(3))
    context = CacheContext(lengths, capacity=9)
    start = 0
    for size in feeds:
        end = start + size
        context.feed(torch.zeros(3, size, dtype=torch.int64))
        y = context.attend(0, q[:, start:end], k[:, start:end], v[:, start:end], window=window, scale=0.3)
        for row, length in enumerate(lengths):
            first = feeds[0] - length  # of the row's own tokens
            mine = slice(max(first, start) - start, size)
            theirs = slice(max(first, start) - first, end - first)
            assert torch.allclose(y[row, mine], expected[row][0, theirs], atol=1e-5)
        start = end


def test_layers_with_and_without_a_window_share_one_cache() -> None:
    q, k, v = queries_keys_values(6, 0)
    context = CacheContext([5], capacity=6)
    whole = RowContext(torch.zeros(1, 6))
    for part in (slice(0, 5), slice(5, 6)):
        context.feed(torch.zeros(1, part.stop - part.start, dtype=torch.int64))
        for site, window in enumerate((None, 2, None, 4)):
            y = context.attend(site, q[:, part], k[:, part] + site, v[:, part], window=window)
            expected = whole.attend(site, q, k + site, v, window=window)[:, part]
            assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_a_bias_is_added_to_the_scores_of_padded_and_single_queries(window: int | None) -> None:
    lengths = [4, 2]
    rows = [queries_keys_values(length + 2, seed) for seed, length in enumerate(lengths)]
    slopes_H = torch.tensor([0.1, 0.5, 1.0, 2.0])

    def distance_bias(num_queries: int, num_keys: int) -> Tensor:  # ALiBi, Press et al. 2022
        query_T = torch.arange(num_keys - num_queries, num_keys)
        return -slopes_H[:, None, None] * (query_T[:, None] - torch.arange(num_keys))

    q, k, v = (padded([row[part] for row in rows], 6) for part in range(3))
    context = CacheContext(lengths, capacity=6)
    for start, end in ((0, 4), (4, 5), (5, 6)):
        context.feed(torch.zeros(2, end - start, dtype=torch.int64))
        bias = distance_bias(end - start, end)[None]
        y = context.attend(0, q[:, start:end], k[:, start:end], v[:, start:end], window=window, bias=bias)
        for row, (own_q, own_k, own_v) in enumerate(rows):
            num = own_q.shape[1]
            whole = RowContext(torch.zeros(1, num)).attend(
                0, own_q, own_k, own_v, window=window, bias=distance_bias(num, num)[None]
            )
            assert torch.allclose(y[row, -1], whole[0, num - (6 - end) - 1], atol=1e-5)


def test_positions_count_from_each_rows_own_start() -> None:
    context = CacheContext([1, 3], capacity=5)
    context.feed(torch.tensor([[0, 0, 5], [6, 7, 8]]))
    assert context.positions_BT.tolist() == [[0, 0, 0], [0, 1, 2]]
    context.feed(torch.tensor([[9], [9]]))
    assert context.positions_BT.tolist() == [[1], [3]]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("feeds", [[4, 1, 1, 1], [4, 3], [5, 2], [7]])
def test_earlier_tokens_are_those_of_the_row_alone(feeds: list[int], steps: int) -> None:
    lengths = [feeds[0], 1, feeds[0] - 1]
    tokens_BT = torch.arange(10, 31).reshape(3, 7)
    context = CacheContext(lengths, capacity=7)
    start = 0
    for size in feeds:
        fed_BT = tokens_BT[:, start : start + size]
        context.feed(fed_BT)
        got_BT = context.earlier(fed_BT, steps, fill=99)
        for row, length in enumerate(lengths):
            own_1T = tokens_BT[row : row + 1, feeds[0] - length :]
            expected_T = RowContext(own_1T).earlier(own_1T, steps, fill=99)[0]
            for column in range(max(start, feeds[0] - length), start + size):
                assert got_BT[row, column - start] == expected_T[column - feeds[0] + length]
        start += size


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 1], [3, 1], [2, 3, 0], [1]])
def test_rows_that_stay_go_on_as_if_they_had_been_alone(rows: list[int]) -> None:
    lengths = [2, 4, 1, 3]
    q, k, v = (torch.cat(parts) for parts in zip(*(queries_keys_values(7, s) for s in range(4)), strict=True))
    tokens_BT = torch.arange(28).reshape(4, 7)

    def run(own_lengths: list[int], own: list[int], then: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        context = CacheContext(own_lengths, capacity=7)
        for start, end in ((0, 4), (4, 5), (5, 6), (6, 7)):
            if start == 5:
                context.keep(then)
                own = [own[row] for row in then]
            context.feed(tokens_BT[own, start:end])
            part = slice(start, end)
            y = context.attend(0, q[own, part], k[own, part], v[own, part], window=4)
        return y, context.positions_BT, context.earlier(tokens_BT[own, 6:7], 2, fill=99)

    kept = run(lengths, [0, 1, 2, 3], rows)
    # The prompt of row 1 is the longest: with it in the batch nobody else's padding differs.
    for place, row in enumerate(rows):
        alone = run([lengths[row], 4], [row, 1], [0, 1])
        for got, expected in zip(kept, alone, strict=True):
            assert torch.allclose(got[place], expected[0], atol=1e-6)


def test_a_full_cache_refuses_to_overflow() -> None:
    context = CacheContext([2], capacity=2)
    context.feed(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(AssertionError, match="cache of 2"):
        context.feed(torch.zeros(1, 1, dtype=torch.int64))
