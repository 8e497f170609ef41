"""ROUGE-L between short texts, exact, and fast enough to keep tens of thousands of instructions apart.

ROUGE-L is the F-measure of the longest common subsequence of two token sequences (Lin 2004, section 3):
F1 = 2 L / (m + n). A new text is compared with all earlier ones in two steps: an inverted index gives every one's
number of tokens in common, which bounds L from above; the few that could reach the threshold are then compared
exactly, with bit-parallel dynamic programming (Hyyrö 2004).
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np

# A word of letters and digits of an alphabet, or a single sign of Chinese, Japanese (whose writing has no blanks).
_TOKEN = re.compile(
    r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\U00020000-\U0003134f]|[^\W_\u3040-\u30ff\u3400-\u9fff]+"
)


def tokens_of(text: str) -> tuple[str, ...]:
    """Lower-case words of letters and digits; every Chinese character is a token of its own."""
    return tuple(_TOKEN.findall(text.lower()))


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, in O(len(second) * len(first) / 64) steps."""
    places: dict[str, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full  # bit i is 0 where the common subsequence grows at first[i]
    for token in second:
        shared = row & places.get(token, 0)
        row = ((row + shared) | (row - shared)) & full
    return len(first) - row.bit_count()


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """F1 of the longest common subsequence, from 0 to 1; 0 where either is empty."""
    return 2 * lcs_length(first, second) / (len(first) + len(second)) if first and second else 0.0


class NoveltyPool:
    """Texts that are kept apart: `nearest` finds the most similar one of those added so far."""

    def __init__(self) -> None:
        self._tokens: list[tuple[str, ...]] = []
        self._lengths = array("i")
        self._owners: dict[str, array[int]] = {}  # token -> which texts have it
        self._counts: dict[str, array[int]] = {}  # and how often each

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, text: str) -> None:
        tokens = tokens_of(text)
        for token, count in Counter(tokens).items():
            self._owners.setdefault(token, array("i")).append(len(self._tokens))
            self._counts.setdefault(token, array("i")).append(count)
        self._tokens.append(tokens)
        self._lengths.append(len(tokens))

    def nearest(self, text: str, at_least: float) -> tuple[float, int] | None:
        """(ROUGE-L, index) of the most similar text, the first of several; None if none reaches `at_least`."""
        if not 0 < at_least <= 1:
            raise ValueError(f"at_least must be in (0, 1], got {at_least}")
        tokens = tokens_of(text)
        if not tokens or not self._tokens:
            return None
        bounds = self._bounds(tokens)
        best: tuple[float, int] | None = None
        for index in np.flatnonzero(bounds >= at_least)[np.argsort(-bounds[bounds >= at_least], kind="stable")]:
            if best is not None and bounds[index] < best[0]:
                break
            score = rouge_l(self._tokens[index], tokens)
            if score >= at_least and (best is None or (score, -index) > (best[0], -best[1])):
                best = score, int(index)
        return best

    def _bounds(self, tokens: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """What ROUGE-L with each text can be at most: 2 x tokens in common / (m + n)."""
        shared = np.zeros(len(self._tokens), dtype=np.int64)
        for token, count in Counter(tokens).items():
            if token in self._owners:
                owners = np.frombuffer(self._owners[token], dtype=np.int32)
                shared[owners] += np.minimum(np.frombuffer(self._counts[token], dtype=np.int32), count)
        return 2 * shared / (np.frombuffer(self._lengths, dtype=np.int32) + len(tokens))


def slow_lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """The textbook's table; the twin that `lcs_length` is tested against."""
    row = [0] * (len(second) + 1)
    for token in first:
        before = row
        row = [0]
        for place, other in enumerate(second):
            row.append(before[place] + 1 if token == other else max(before[place + 1], row[place]))
    return row[-1]
