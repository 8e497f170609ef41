"""Packing documents into rows of T positions, best fit first, losing no token.

A row starts at a document's start, or goes on with a document longer than T; pieces in one row never see each other
(segments keep them apart). Best fit decreasing (Johnson 1973; for training rows Ding et al. 2024, "Fewer Truncations
Improve Language Modeling") puts the next longest piece where it leaves the least room. All lengths lie in 1..T, so
whole groups of equal pieces are placed at once.

Everything is a function of (seed, step): resuming needs nothing but the step. Steps run through the epochs without a
gap, so every step has all its rows and every row of an epoch comes exactly once.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fledge.data.shards import Shards
from fledge.errors import ConfigError, DataError
from fledge.types import Piece, Row

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Cuts:
    """Pieces of documents, none longer than a row: `length_P` positions of `document_P` from `start_P` on."""

    document_P: Ints
    start_P: Ints
    length_P: Ints


class Documents(Protocol):
    """What can be packed. Both methods are pure: the same arguments give the same pieces."""

    def cut(self, epoch: int, row_length: int) -> Cuts: ...
    def piece(self, epoch: int, document: int, start: int, length: int) -> Piece: ...


class RowSource(Protocol):
    """An endless sequence of rows."""

    def row(self, index: int) -> Row: ...


class ShardDocuments:
    """Documents of shards as they are: of all of them, or of those numbered in `chosen_N`."""

    def __init__(self, shards: Shards, chosen_N: Ints | None = None) -> None:
        self.shards = shards
        self.chosen_N = np.arange(shards.num_documents) if chosen_N is None else chosen_N
        self.num_positions_N: Ints = shards.num_positions_N[self.chosen_N]

    def cut(self, epoch: int, row_length: int) -> Cuts:
        return cut_evenly(self.num_positions_N, row_length)

    def piece(self, epoch: int, document: int, start: int, length: int) -> Piece:
        ids = self.shards.ids(int(self.chosen_N[document]), start, length)
        return Piece(ids, np.ones(len(ids), np.float32))


class PieceList:
    """Pieces held in memory, conversations for instance. One longer than a row goes on in the next."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = [piece for piece in pieces if len(piece.ids) > 1]  # one token alone predicts nothing
        self.num_positions_N = np.array([len(piece.ids) - 1 for piece in self.pieces], np.int64)

    def cut(self, epoch: int, row_length: int) -> Cuts:
        return cut_evenly(self.num_positions_N, row_length)

    def piece(self, epoch: int, document: int, start: int, length: int) -> Piece:
        whole = self.pieces[document]
        part = slice(start, start + length + 1)
        return Piece(whole.ids[part], whole.loss_mask[part])


def cut_evenly(num_positions_N: Ints, row_length: int) -> Cuts:
    """Documents in pieces of `row_length` positions; the last piece of each is what is left."""
    num_pieces_N = -(-num_positions_N // row_length)
    document_P = np.repeat(np.arange(len(num_positions_N)), num_pieces_N)
    first_N = np.cumsum(num_pieces_N) - num_pieces_N
    start_P = (np.arange(len(document_P)) - first_N[document_P]) * row_length
    length_P = np.minimum(num_positions_N[document_P] - start_P, row_length)
    return Cuts(document_P, start_P, length_P)


def best_fit(length_P: Ints, row_length: int, rng: np.random.Generator) -> Ints:
    """row_P: the row (from 0) each piece goes to. Which of several equal pieces goes where is drawn from `rng`.

    The number of rows depends on the lengths alone.
    """
    shuffled_P = rng.permutation(len(length_P))
    sorted_P = shuffled_P[np.argsort(-length_P[shuffled_P], kind="stable")]
    row_P = np.empty(len(length_P), np.int64)
    rooms = _Rooms(row_length)
    values, counts = np.unique(-length_P, return_counts=True)
    position = 0
    for negative, count in zip(values.tolist(), counts.tolist(), strict=True):
        row_P[sorted_P[position : position + count]] = rooms.place(-negative, count)
        position += count
    return row_P


class _Rooms:
    """Open rows by the room they have left: `_rows[room]` is an array of rows, `_sizes` the rooms there are, sorted."""

    def __init__(self, row_length: int) -> None:
        self._row_length = row_length
        self._rows: dict[int, Ints] = {}
        self._sizes: list[int] = []
        self._num_rows = 0

    def place(self, length: int, count: int) -> Ints:
        """The rows that take `count` pieces of `length`: each the one with the least room, else new ones."""
        taken: list[Ints] = []
        while count > 0:
            where = bisect.bisect_left(self._sizes, length)
            if where == len(self._sizes):
                self._open(length, count)
                continue
            room = self._sizes[where]
            rows = self._rows[room]
            taken.append(rows[:count])
            self._put(room, rows[count:])
            self._put(room - length, np.concatenate([self._rows.get(room - length, rows[:0]), rows[:count]]))
            count -= len(taken[-1])
        return np.concatenate(taken)

    def _open(self, length: int, count: int) -> None:
        """New empty rows, just as many as `count` pieces of `length` need."""
        num_new = -(-count // (self._row_length // length))
        self._put(self._row_length, np.arange(self._num_rows, self._num_rows + num_new))
        self._num_rows += num_new

    def _put(self, room: int, rows: Ints) -> None:
        if room == 0:
            return
        known = room in self._rows
        if len(rows):
            self._rows[room] = rows
            if not known:
                bisect.insort(self._sizes, room)
        elif known:
            del self._rows[room]
            self._sizes.remove(room)


@dataclass(frozen=True)
class _Plan:
    """One epoch: pieces ordered by row; row r holds pieces `offset_R[r]` to `offset_R[r+1]`."""

    cuts: Cuts
    offset_R: Ints


class PackedRows:
    """Documents as an endless sequence of packed rows: all rows of epoch 0 in random order, then epoch 1, ...

    Raises `DataError` when there is nothing to pack.
    """

    def __init__(self, documents: Documents, row_length: int, seed: int) -> None:
        if row_length < 1:
            raise ConfigError(f"row_length must be at least 1, got {row_length}")
        self.documents = documents
        self.row_length = row_length
        self.seed = seed
        self._plans: dict[int, _Plan] = {}
        self._ends: list[int] = []  # rows up to the end of each epoch planned so far
        if self.num_rows(0) == 0:
            raise DataError("no document to pack into rows: expected at least one; choose a source that has text")

    def num_rows(self, epoch: int) -> int:
        while len(self._ends) <= epoch:
            planned = len(self._plan(len(self._ends)).offset_R) - 1
            self._ends.append(planned + (self._ends[-1] if self._ends else 0))
        return self._ends[epoch] - (self._ends[epoch - 1] if epoch else 0)

    def steps_per_epoch(self, rows_per_step: int) -> int:
        """Steps after which every row of epoch 0 has come at least once."""
        return -(-self.num_rows(0) // rows_per_step)

    def num_steps(self, epochs: int, rows_per_step: int) -> int:
        """Steps that go through `epochs` whole epochs; the last of them may hold rows of the next one."""
        self.num_rows(epochs - 1)
        return -(-self._ends[epochs - 1] // rows_per_step)

    def padding_share(self, epoch: int = 0) -> float:
        """Share of the positions of an epoch's rows that hold no token."""
        plan = self._plan(epoch)
        return 1.0 - float(plan.cuts.length_P.sum()) / ((len(plan.offset_R) - 1) * self.row_length)

    def place(self, index: int) -> tuple[int, int]:
        """(epoch, row within it) of the row at `index`."""
        while not self._ends or index >= self._ends[-1]:
            self.num_rows(len(self._ends))
        epoch = bisect.bisect_right(self._ends, index)
        return epoch, index - (self._ends[epoch - 1] if epoch else 0)

    def row(self, index: int) -> Row:
        epoch, number = self.place(index)
        plan = self._plan(epoch)
        cuts = plan.cuts
        return tuple(
            self.documents.piece(epoch, int(cuts.document_P[p]), int(cuts.start_P[p]), int(cuts.length_P[p]))
            for p in range(plan.offset_R[number], plan.offset_R[number + 1])
        )

    def batch(self, step: int, rows_per_step: int) -> list[Row]:
        """The rows of step `step` (from 0): always `rows_per_step` of them."""
        return batch(self, step, rows_per_step)

    def _plan(self, epoch: int) -> _Plan:
        if epoch not in self._plans:
            for old in sorted(self._plans)[:-1]:  # a step can touch two epochs, no more are kept
                del self._plans[old]
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> _Plan:
        cuts = self.documents.cut(epoch, self.row_length)
        rng = np.random.default_rng([self.seed, epoch])
        row_P = best_fit(cuts.length_P, self.row_length, rng) if len(cuts.length_P) else cuts.length_P
        num_rows = int(row_P.max()) + 1 if len(row_P) else 0
        row_P = rng.permutation(num_rows)[row_P]
        shuffled_P = rng.permutation(len(row_P))  # else the longest piece of every row would come first
        order_P = shuffled_P[np.argsort(row_P[shuffled_P], kind="stable")]
        offset_R = np.searchsorted(row_P[order_P], np.arange(num_rows + 1))
        return _Plan(Cuts(cuts.document_P[order_P], cuts.start_P[order_P], cuts.length_P[order_P]), offset_R)


def batch(source: RowSource, step: int, rows_per_step: int) -> list[Row]:
    """Rows `step * rows_per_step` and following of any source of rows."""
    first = step * rows_per_step
    return [source.row(index) for index in range(first, first + rows_per_step)]
