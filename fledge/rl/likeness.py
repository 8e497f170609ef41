"""How alike two texts are, from 0 to 1, by the measures that graders may ask for.

Words are runs of letters and digits in lower case, and every character of a script without spaces. Imports nothing but
the standard library (see graders.py).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise

Measure = Callable[[str, str], float]
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def common_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The length of the longest common subsequence, by bits (Hyyro 2004, "Bit-parallel LCS-length computation")."""
    masks: dict[Hashable, int] = {}
    for place, item in enumerate(a):
        masks[item] = masks.get(item, 0) | 1 << place
    full = state = (1 << len(a)) - 1
    for item in b:
        met = state & masks.get(item, 0)
        state = ((state + met) | (state - met)) & full
    return (full & ~state).bit_count()


def fuzzy_match(given: str, reference: str) -> float:
    """1 minus the share of characters to insert or delete: twice the common subsequence over both lengths."""
    total = len(given) + len(reference)
    return 2 * common_length(given, reference) / total if total else 1.0


def bleu(given: str, reference: str) -> float:
    """Papineni et al. 2002, of one sentence; counts above single words plus one (Lin and Och 2004)."""
    said, wanted = words(given), words(reference)
    if not said or not wanted:
        return float(said == wanted)
    logs = []
    for n in range(1, 5):
        ours, theirs = _grams(said, n), _grams(wanted, n)
        extra = int(n > 1)
        hits, total = (ours & theirs).total() + extra, ours.total() + extra
        if hits == 0:
            return 0.0
        logs.append(math.log(hits / total))
    brevity = min(0.0, 1 - len(wanted) / len(said))
    return math.exp(brevity + sum(logs) / 4)


def gleu(given: str, reference: str) -> float:
    """Wu et al. 2016, section 5: the lesser of precision and recall over all runs of 1 to 4 words."""
    said, wanted = words(given), words(reference)
    ours, theirs = (sum((_grams(some, n) for n in range(1, 5)), Counter()) for some in (said, wanted))
    most = max(ours.total(), theirs.total())
    return (ours & theirs).total() / most if most else float(said == wanted)


def meteor(given: str, reference: str) -> float:
    """Banerjee and Lavie 2005, with equal words alone: no stems, no synonyms."""
    said, wanted = words(given), words(reference)
    places: dict[str, list[int]] = {}
    for place, word in reversed(list(enumerate(wanted))):
        places.setdefault(word, []).append(place)
    matched: list[tuple[int, int]] = []
    for place, word in enumerate(said):
        if places.get(word):
            follows = matched and matched[-1][0] == place - 1 and matched[-1][1] + 1 in places[word]
            target = matched[-1][1] + 1 if follows else places[word][-1]
            places[word].remove(target)
            matched.append((place, target))
    if not matched:
        return float(said == wanted)
    precision, recall = len(matched) / len(said), len(matched) / len(wanted)
    mean = 10 * precision * recall / (recall + 9 * precision)
    chunks = 1 + sum(later != (earlier[0] + 1, earlier[1] + 1) for earlier, later in pairwise(matched))
    return mean * (1 - 0.5 * (chunks / len(matched)) ** 3)


def rouge_n(n: int) -> Measure:
    """Lin 2004: the harmonic mean of precision and recall over runs of n words."""

    def measure(given: str, reference: str) -> float:
        said, wanted = words(given), words(reference)
        if min(len(said), len(wanted)) < n:
            return float(said == wanted)
        ours, theirs = _grams(said, n), _grams(wanted, n)
        return _f1((ours & theirs).total(), ours.total(), theirs.total())

    return measure


def rouge_l(given: str, reference: str) -> float:
    """Lin 2004: the same over the longest common subsequence of words."""
    said, wanted = words(given), words(reference)
    return _f1(common_length(said, wanted), len(said), len(wanted))


def likeness(measure: str, given: str, reference: str) -> float:
    return MEASURES[measure](given, reference)


def _grams(some: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(some[i : i + n]) for i in range(len(some) - n + 1))


def _f1(hits: int, said: int, wanted: int) -> float:
    if not said or not wanted:
        return float(said == wanted)
    return 2 * hits / (said + wanted)


# The published 'cosine' asks an embedding model, which a confined process does not have.
MEASURES: Mapping[str, Measure] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    "meteor": meteor,
    **{f"rouge_{n}": rouge_n(n) for n in range(1, 6)},
    "rouge_l": rouge_l,
}
