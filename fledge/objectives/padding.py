"""Passes over rows of unequal length that leave their padding out.

A batch of answers is as wide as its longest one and most of it is padding. Where no compiled graph wants one fixed
shape, rows of like lengths go through the model together, each group as wide as its own longest row, and what the model
says is put back where it belongs. A row's numbers do not depend on its group but for rounding.

Suffixes: B rows, T positions; b rows of a group, L positions of its longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MOST_GROUPS = 4
# What one more pass costs, in positions of a pass: an accelerator is only full with many rows.
PASS_POSITIONS = {"cpu": 256, "cuda": 65_536}


class Group(NamedTuple):
    """Rows `rows_b`: position l of row b stands in its column `columns_bL[b, l]`; not `inside_bL`: behind its end."""

    rows_b: Tensor
    columns_bL: Tensor
    inside_bL: Tensor

    def of(self, x_BT: Tensor) -> Tensor:
        """What these rows hold there, (b, L)."""
        return x_BT[self.rows_b[:, None], self.columns_bL]


def groups_of(segments_BT: Tensor) -> Iterator[Group]:
    """The rows by length, without those of padding alone (segment 0); of nothing else, one group one column wide."""
    width, is_real_BT = segments_BT.shape[1], segments_BT != 0
    first_B, after_B = (x_BT.to(torch.uint8).argmax(dim=1) for x_BT in (is_real_BT, is_real_BT.flip(1)))
    length_B = torch.where(is_real_BT.any(dim=1), width - after_B - first_B, 0)
    rows = length_B.argsort(stable=True)
    rows = rows[(length_B == 0).sum() :] if length_B.any() else rows
    for rows_b in _cut(rows, length_B[rows].tolist()):
        place_L = torch.arange(max(1, int(length_B[rows_b].max())), device=rows.device)
        columns_bL = (first_B[rows_b, None] + place_L).clamp(max=width - 1)
        yield Group(rows_b, columns_bL, place_L < length_B[rows_b, None])


def _cut(rows: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """The rows, whose lengths rise, in as many groups as together cost least."""
    pass_positions = PASS_POSITIONS.get(rows.device.type, 0)

    def cost(number: int) -> int:
        # As `tensor_split` cuts: the first ones are one row longer where it does not come out even.
        each, longer = divmod(len(lengths), number)
        ends = [each * n + min(n, longer) for n in range(1, number + 1)]
        counts = [each + (n < longer) for n in range(number)]
        return sum(count * lengths[end - 1] for count, end in zip(counts, ends, strict=True)) + number * pass_positions

    return rows.tensor_split(min(range(1, min(MOST_GROUPS, len(lengths)) + 1), key=cost))


def without_padding(run: Callable[[Group, Tensor], Tensor], segments_BT: Tensor) -> Tensor:
    """(B, T): what `run(group, segments_bL)` says of every group, (b, L), in its place; 0 at padding."""
    found_BT: Tensor | None = None
    for group in groups_of(segments_BT):
        said_bL = run(group, group.of(segments_BT) * group.inside_bL)
        if found_BT is None:
            found_BT = said_bL.new_zeros(segments_BT.shape)
        rows_bL = group.rows_b[:, None].expand_as(group.columns_bL)
        inside = group.inside_bL
        found_BT = found_BT.index_put((rows_bL[inside], group.columns_bL[inside]), said_bL[inside])
    assert found_BT is not None
    return found_BT
