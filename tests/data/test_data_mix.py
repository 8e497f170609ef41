"""Mixtures: the shares hold over any stretch, every source's rows come in order, one place a row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.data.mix import PATTERN, Mixture
from fledge.errors import ConfigError
from fledge.types import Piece, Row


class Numbered:
    """Row n of this source is one piece that says n."""

    def row(self, index: int) -> Row:
        return (Piece(np.array([index, index], np.int32), np.ones(2, np.float32)),)


def mixture(shares: dict[str, float]) -> Mixture:
    return Mixture({name: Numbered() for name in shares}, shares)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(0, 2500))
@settings(deadline=None, max_examples=40)
def test_any_beginning_is_close_to_the_shares_and_skips_no_row(weights: list[float], num_rows: int) -> None:
    mixed = mixture({str(n): weight for n, weight in enumerate(weights)})
    numbers: dict[str, list[int]] = {name: [] for name in mixed.names}
    for index in range(num_rows):
        name, number = mixed.place(index)
        numbers[name].append(number)
    for name, weight in zip(mixed.names, weights, strict=True):
        assert numbers[name] == list(range(len(numbers[name])))
        assert len(numbers[name]) == mixed.rows_of(name, num_rows)
        assert abs(len(numbers[name]) - num_rows * weight / sum(weights)) <= 2 + num_rows / PATTERN


def test_a_batch_depends_on_its_step_alone() -> None:
    mixed = mixture({"code": 0.7, "prose": 0.3})
    rows = [mixed.row(index) for index in range(5 * 16, 6 * 16)]
    again = mixture({"code": 0.7, "prose": 0.3}).batch(5, 16)
    assert [row[0].ids.tolist() for row in rows] == [row[0].ids.tolist() for row in again]
    assert mixed.rows_of("code", PATTERN) == 0.7 * PATTERN


def test_a_source_with_share_zero_is_left_out() -> None:
    mixed = mixture({"code": 1.0, "prose": 0.0})
    assert mixed.names == ("code",)
    assert mixed.rows_of("prose", 100) == 0


def test_shares_that_cannot_be_honoured_are_refused() -> None:
    with pytest.raises(ConfigError, match="share of 'b'"):
        mixture({"a": 1.0, "b": 1e-6})
    with pytest.raises(ConfigError, match="share of 'b'"):
        mixture({"a": 1.0, "b": -0.5})
    with pytest.raises(ConfigError, match="name the same ones"):
        Mixture({"a": Numbered()}, {"b": 1.0})
