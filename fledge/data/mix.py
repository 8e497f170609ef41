"""Mixing sources of rows by shares: 70 % code and 30 % prose, say. A function of the row's number alone.

A repeating pattern of PATTERN rows holds each source in its share, evenly spread, so any stretch of rows is close to
the shares and resuming needs nothing but the step. Each source goes through its own epochs at its own pace.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fledge.data.pack import Ints, RowSource, batch
from fledge.errors import ConfigError
from fledge.types import Row

PATTERN = 1000  # shares are honoured to a tenth of a percent


class Mixture:
    """Rows of several sources. `shares` need not add up to 1; `ConfigError` for one that is negative or too small."""

    def __init__(self, sources: Mapping[str, RowSource], shares: Mapping[str, float]) -> None:
        if set(sources) != set(shares) or not sources:
            raise ConfigError(
                f"shares are given for {sorted(shares)}, sources are {sorted(sources)}: name the same ones"
            )
        total = sum(shares.values())
        self.names = tuple(name for name in sources if shares[name] != 0)
        small = [name for name in self.names if not shares[name] / total >= 1 / PATTERN]
        if small:
            raise ConfigError(
                f"the share of '{small[0]}' is {shares[small[0]]}: expected 0 or at least {1 / PATTERN:.1%}"
            )
        self._sources = sources
        counts = _apportion(np.array([shares[name] / total for name in self.names]))
        self._counts = counts
        self._pattern = _spread(counts)
        is_source = self._pattern[:, None] == np.arange(len(counts))
        self._before = np.vstack([np.zeros(len(counts), np.int64), np.cumsum(is_source, axis=0)])

    def place(self, index: int) -> tuple[str, int]:
        """(source, number of the row within that source) of the row at `index`."""
        cycle, phase = divmod(index, PATTERN)
        which = int(self._pattern[phase])
        return self.names[which], int(cycle * self._counts[which] + self._before[phase, which])

    def row(self, index: int) -> Row:
        name, number = self.place(index)
        return self._sources[name].row(number)

    def batch(self, step: int, rows_per_step: int) -> list[Row]:
        """The rows of step `step` (from 0): always `rows_per_step` of them."""
        return batch(self, step, rows_per_step)

    def rows_of(self, name: str, num_rows: int) -> int:
        """How many of the first `num_rows` rows come from a source."""
        if name not in self.names:
            return 0
        which = self.names.index(name)
        cycle, phase = divmod(num_rows, PATTERN)
        return int(cycle * self._counts[which] + self._before[phase, which])


def _apportion(shares: NDArray[np.float64]) -> Ints:
    """Whole numbers that add up to PATTERN, nearest to the shares (largest remainders)."""
    exact = shares * PATTERN
    counts = np.floor(exact).astype(np.int64)
    short = PATTERN - int(counts.sum())
    counts[np.argsort(-(exact - counts), kind="stable")[:short]] += 1
    return counts


def _spread(counts: Ints) -> Ints:
    """PATTERN entries with source s `counts[s]` times, its i-th one near (i + 1/2) / counts[s] of the way."""
    sources = np.repeat(np.arange(len(counts)), counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    position = (np.arange(len(sources)) - firsts + 0.5) / counts[sources]
    spread: Ints = sources[np.argsort(position, kind="stable")]
    return spread
