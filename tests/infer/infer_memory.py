"""A model without tensors over paged memory: it sees at once whether a block holds what its sequence believes.

A cell of memory holds a number made from everything up to and with its token, so two texts that differ anywhere differ
in every cell that follows. What the model says next is made from the last cell: wrong memory gives a wrong answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fledge.infer.sequence import Live, Span

VOCAB = 3


def cells(salt: str, tokens: Sequence[int]) -> list[int]:
    """What memory must hold for `tokens`, position by position."""
    found, last = [], hash(("salt", salt))
    for token in tokens:
        last = hash((last, token))
        found.append(last)
    return found


def next_token(cell: int) -> int:
    return (cell >> 7) % VOCAB


def answer(salt: str, prompt: Sequence[int], count: int) -> list[int]:
    """What the model says to `prompt`, without any scheduler: the oracle."""
    tokens, last = [], cells(salt, prompt)[-1]
    for _ in range(count):
        tokens.append(next_token(last))
        last = hash((last, tokens[-1]))
    return tokens


class Memory:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._cells: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]

    def read(self, live: Live, num_positions: int) -> list[int | None]:
        size = self.block_size
        return [self._cells[live.blocks[position // size]][position % size] for position in range(num_positions)]

    def write(self, live: Live, start: int, tokens: Iterable[int]) -> None:
        """Compute `tokens` at `start` onwards from what stands before them, as a forward pass does."""
        size = self.block_size
        before = self.read(live, start)[-1] if start else hash(("salt", live.salt))
        for position, token in enumerate(tokens, start):
            before = hash((before, token))
            self._cells[live.blocks[position // size]][position % size] = before

    def run(self, span: Span) -> list[int]:
        """Run a span, check all that it attends to; what the model says after its newest token and each draft token."""
        live, end = span.live, span.start + span.count - span.num_draft
        tokens = [*live.tokens[span.start : end], *live.draft[: span.num_draft]]
        self.write(live, span.start, tokens)
        expected = cells(live.salt, [*live.tokens[:end], *live.draft[: span.num_draft]])
        assert self.read(live, span.start + span.count) == expected, f"sequence {live.id} reads what is not its own"
        return [next_token(cell) for cell in expected[end - 1 :]]


def accepted(span: Span, said: Sequence[int]) -> list[int]:
    """Greedy verification: the draft as long as it is what the model says, and one token more."""
    taken = 0
    while taken < span.num_draft and span.live.draft[taken] == said[taken]:
        taken += 1
    return list(said[: taken + 1])
