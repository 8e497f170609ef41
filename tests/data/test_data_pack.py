"""Packing: nothing is lost, nothing crosses, everything is a function of the step."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.data.pack import PackedRows, PieceList, best_fit
from fledge.errors import ConfigError, DataError
from fledge.types import Piece, Row

documents_of_ids = st.lists(st.lists(st.integers(0, 10_000), min_size=2, max_size=40), min_size=1, max_size=25)


def pieces_of(documents: list[list[int]]) -> list[Piece]:
    return [Piece(np.array(ids, np.int32), np.arange(len(ids), dtype=np.float32)) for ids in documents]


def positions_of(rows: list[Row]) -> Counter[tuple[int, int, float]]:
    """Every (token, target, weight of the target) of the rows."""
    return Counter(
        triple
        for row in rows
        for piece in row
        for triple in zip(piece.ids[:-1].tolist(), piece.ids[1:].tolist(), piece.loss_mask[1:].tolist(), strict=True)
    )


@given(documents_of_ids, st.integers(1, 17), st.integers(0, 3), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_every_position_and_its_target_come_exactly_once_an_epoch(
    documents: list[list[int]], row_length: int, seed: int, epoch: int
) -> None:
    pieces = pieces_of(documents)
    packed = PackedRows(PieceList(pieces), row_length, seed)
    first = sum(packed.num_rows(e) for e in range(epoch))
    rows = [packed.row(index) for index in range(first, first + packed.num_rows(epoch))]
    assert positions_of(rows) == positions_of([(piece,) for piece in pieces])


@given(documents_of_ids, st.integers(1, 17))
@settings(deadline=None, max_examples=60)
def test_rows_hold_whole_documents_or_stretches_of_one_longer_than_a_row(
    documents: list[list[int]], row_length: int
) -> None:
    numbered = [[1000 * n + i for i in range(len(ids))] for n, ids in enumerate(documents)]
    packed = PackedRows(PieceList(pieces_of(numbered)), row_length, seed=0)
    for row in packed.batch(0, packed.num_rows(0)):
        assert row
        assert sum(len(piece.ids) - 1 for piece in row) <= row_length
        for piece in row:
            document, start = divmod(int(piece.ids[0]), 1000)
            assert np.array_equal(piece.ids, np.arange(len(piece.ids)) + piece.ids[0])
            assert start % row_length == 0
            rest = len(numbered[document]) - 1 - start
            assert len(piece.ids) - 1 == min(rest, row_length)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_best_fit_by_groups_needs_as_many_rows_as_best_fit_one_by_one(lengths: list[int], seed: int) -> None:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= length]
        if fits:
            rooms[rooms.index(min(fits))] -= length
        else:
            rooms.append(30 - length)
    row_P = best_fit(np.array(lengths), 30, np.random.default_rng(seed))
    assert row_P.max() + 1 == len(rooms)
    assert np.bincount(row_P, weights=lengths).max() <= 30
    assert len(np.unique(row_P)) == len(rooms)


def test_a_piece_goes_where_it_leaves_the_least_room() -> None:
    # The 3 fills up the row of the 7; in the row of the 6, where more room is, it would cost the 2s a third row.
    row_P = best_fit(np.array([7, 6, 3, 2, 2]), 10, np.random.default_rng(0))
    assert row_P.tolist() == [0, 1, 0, 1, 1]


def test_a_step_is_the_same_however_it_is_reached() -> None:
    documents = PieceList(pieces_of([[n, n + 1, n + 2][: 2 + n % 2] for n in range(50)]))
    through = PackedRows(documents, 8, seed=3)
    batches = [through.batch(step, 3) for step in range(20)]
    resumed = PackedRows(documents, 8, seed=3)
    for step in (19, 7, 0, 12):
        for one, other in zip(resumed.batch(step, 3), batches[step], strict=True):
            assert all(np.array_equal(a.ids, b.ids) for a, b in zip(one, other, strict=True))


def test_steps_run_through_epochs_without_a_gap() -> None:
    packed = PackedRows(PieceList(pieces_of([[n, n] * 3 for n in range(7)])), 5, seed=0)
    assert packed.num_rows(0) == packed.num_rows(1) == 7
    assert packed.steps_per_epoch(4) == 2
    assert packed.num_steps(3, 4) == 6
    seen = Counter(int(row[0].ids[0]) for step in range(7) for row in packed.batch(step, 4))
    assert seen == dict.fromkeys(range(7), 4)
    assert [packed.place(index) for index in (0, 6, 7, 14)] == [(0, 0), (0, 6), (1, 0), (2, 0)]


def test_another_epoch_and_another_seed_come_in_another_order() -> None:
    documents = PieceList(pieces_of([[n, n] for n in range(200)]))
    firsts = [
        [int(piece.ids[0]) for row in PackedRows(documents, 1, seed).batch(step, 200) for piece in row]
        for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    assert firsts[0] != firsts[1] != firsts[2] != firsts[0]
    assert sorted(firsts[0]) == sorted(firsts[1]) == list(range(200))


def test_padding_share_counts_the_positions_without_a_token() -> None:
    packed = PackedRows(PieceList(pieces_of([[0] * 5, [0] * 5, [0] * 3])), 6, seed=0)
    assert packed.num_rows(0) == 2
    assert packed.padding_share() == pytest.approx(2 / 12)


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(DataError, match="no document to pack"):
        PackedRows(PieceList([Piece(np.array([1], np.int32), np.ones(1, np.float32))]), 4, seed=0)
    with pytest.raises(ConfigError, match="row_length"):
        PackedRows(PieceList(pieces_of([[1, 2]])), 0, seed=0)


@pytest.mark.slow
def test_ten_million_tokens_are_planned_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(2, 400, size=50_000)
    documents = PieceList([])
    documents.num_positions_N = lengths
    started = time.process_time()
    PackedRows(documents, 1024, seed=0)
    assert time.process_time() - started < 10
