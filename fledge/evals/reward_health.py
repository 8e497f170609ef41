"""Can a reward model be trusted? Accuracy by group, calibration, biases, probes: each figure with its n and interval.

Every share has a 95 % interval by bootstrap over prompts, whose answers stand or fall together. Sources: Ouyang et al.
2022 (2203.02155), sections 3.4 and 3.5 (labelers, accuracy); Guo et al. 2017 (calibration); Singhal et al. 2023
(2310.03716, length); Wang et al. 2023 (2305.17926, position). Letters: N prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fledge.errors import DataError
from fledge.evals.bootstrap import Interval, bootstrap, bootstrap_ratio
from fledge.evals.reward_accuracy import MATCHED_LENGTHS, pearson
from fledge.types import Ranking

NUM_BINS = 10  # of confidence
MAX_LEVELS = 9  # of a labeler's confidence that are shown one by one; more are put into quarters
QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")
RESAMPLES = 4_000
OWN_LABELERS, HELD_OUT_LABELERS = "all labelers of the training data", "all held-out labelers"


@dataclass(frozen=True)
class Scored:
    """A ranking, what the reward model says to each of its answers, and what each member of an ensemble says."""

    ranking: Ranking
    scores: tuple[float, ...]
    members: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two answers of which one was ranked better. `margin` is the score of the better minus that of the worse."""

    prompt: int
    margin: float
    members: tuple[float, ...]
    ranking: Ranking
    better: int
    worse: int

    @property
    def credit(self) -> float:
        """1 for the right order, 0 for the wrong one, a half where the scores are equal."""
        return 0.5 + 0.5 * float(np.sign(self.margin))

    @property
    def lengths(self) -> tuple[int, int]:
        """Characters of the better and of the worse answer."""
        return len(self.ranking.completions[self.better]), len(self.ranking.completions[self.worse])

    @property
    def is_better_shown_first(self) -> bool | None:
        """Whether the labeler saw the better one first; None if nobody wrote it down."""
        shown = self.ranking.shown
        return None if shown is None else shown[self.better] < shown[self.worse]


@dataclass(frozen=True)
class Share:
    """A share or a mean with its 95 % interval over prompts, and how many pairs of how many prompts it is of."""

    value: float
    low: float
    high: float
    pairs: int
    prompts: int


@dataclass(frozen=True)
class Group:
    """Accuracy on the pairs of one group: a source, a labeler, a level of confidence."""

    name: str
    accuracy: Share


@dataclass(frozen=True)
class Bin:
    """Pairs to whose order the model gives a probability in one tenth: what it says, and how often it is right."""

    low: float
    high: float
    confidence: float
    accuracy: Share


@dataclass(frozen=True)
class Lengths:
    """What length does. Correlations of score and characters, over all answers and within a prompt; shares of pairs in
    which the labelers, or the model, prefer the longer answer; accuracy where the better answer is longer, shorter,
    or as long (within 10 %)."""

    correlation: Share
    correlation_within: Share
    labelers_prefer_longer: Share | None
    model_prefers_longer: Share | None
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Positions:
    """What the place does in which labelers saw an answer: shares of pairs in which the first is preferred by them and
    by the model (which reads one answer at a time), and accuracy where the better one stood first, or second."""

    labelers_prefer_first: Share
    model_prefers_first: Share
    groups: tuple[Group, ...]


def comparisons(scored: Sequence[Scored]) -> list[Comparison]:
    """All pairs that are no ties. `DataError` if there are none, or a score is not a number."""
    if not all(math.isfinite(score) for one in scored for score in one.scores):
        raise DataError("the reward model gave a score that is not a number; its checkpoint is broken")
    found = []
    for number, one in enumerate(scored):
        ranks = one.ranking.ranks
        for i, j in combinations(range(len(ranks)), 2):
            if ranks[i] == ranks[j]:
                continue
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            members = tuple(member[better] - member[worse] for member in one.members)
            margin = one.scores[better] - one.scores[worse]
            found.append(Comparison(number, margin, members, one.ranking, better, worse))
    if not found:
        raise DataError("no held-out ranking holds two answers of different rank; there is nothing to be right about")
    return found


def share(pairs: Sequence[Comparison], value: Callable[[Comparison], float], seed: int) -> Share:
    """The mean of `value`, from 0 to 1, over pairs, resampled by prompt."""
    numbers = {prompt: place for place, prompt in enumerate(dict.fromkeys(pair.prompt for pair in pairs))}
    top_N, bottom_N = np.zeros(len(numbers)), np.zeros(len(numbers))
    for pair in pairs:
        top_N[numbers[pair.prompt]] += value(pair)
        bottom_N[numbers[pair.prompt]] += 1
    found = bootstrap_ratio(top_N, bottom_N, seed=seed, num_resamples=RESAMPLES)
    return _share(wilson(found, len(numbers)), len(pairs), len(numbers))


def accuracy(pairs: Sequence[Comparison], seed: int) -> Share:
    return share(pairs, lambda pair: pair.credit, seed)


def groups(pairs: Sequence[Comparison], name: Callable[[Comparison], str | None], seed: int) -> tuple[Group, ...]:
    """Accuracy by what `name` says of a pair, most pairs first; pairs without a name are left out."""
    by_name: dict[str, list[Comparison]] = {}
    for pair in pairs:
        if (label := name(pair)) is not None:
            by_name.setdefault(label, []).append(pair)
    order = sorted(by_name, key=lambda label: (-len(by_name[label]), label))
    return tuple(Group(label, accuracy(by_name[label], seed)) for label in order)


def source_of(pair: Comparison) -> str:
    return pair.ranking.provenance.source


def makers_of(pair: Comparison) -> str:
    return f"{pair.ranking.makers[pair.better]} over {pair.ranking.makers[pair.worse]}"


def labeler_of(pair: Comparison) -> str | None:
    return labeler_name(pair.ranking)


def labeler_name(ranking: Ranking) -> str | None:
    """Who judged, with the kind where it is not a human; None if the data do not say."""
    judgement = ranking.judgement
    if judgement is None:
        return None
    name = judgement.labeler or "unnamed"
    return name if judgement.kind == "human" else f"{name} ({judgement.kind})"


def by_standing(pairs: Sequence[Comparison], trained: Sequence[Ranking], seed: int) -> tuple[Group, ...]:
    """Accuracy on the labelers of the training data and on all others together; nothing where there are no others."""
    known = {labeler_name(ranking) for ranking in trained}

    def standing(pair: Comparison) -> str | None:
        name = labeler_of(pair)
        return None if name is None else OWN_LABELERS if name in known else HELD_OUT_LABELERS

    found = groups(pairs, standing, seed)
    return found if any(group.name == HELD_OUT_LABELERS for group in found) else ()


def by_confidence(pairs: Sequence[Comparison], seed: int) -> tuple[Group, ...]:
    """Accuracy by how sure the labelers were, the least sure first."""
    found = groups(pairs, _confidence_name(pairs), seed)
    order = {name: float(place) for place, name in enumerate(QUARTERS)}
    return tuple(sorted(found, key=lambda group: order[group.name] if group.name in order else float(group.name)))


def _confidence_name(pairs: Sequence[Comparison]) -> Callable[[Comparison], str | None]:
    """How a labeler's confidence is told: each level by itself, or in quarters where there are more than nine."""
    given = [j.confidence for pair in pairs if (j := pair.ranking.judgement) is not None and j.confidence is not None]
    edges = [] if len(set(given)) <= MAX_LEVELS else list(np.quantile(given, [0.25, 0.5, 0.75]))

    def name(pair: Comparison) -> str | None:
        judgement = pair.ranking.judgement
        if judgement is None or judgement.confidence is None:
            return None
        if not edges:
            return f"{judgement.confidence:g}"
        quarter = int(np.searchsorted(edges, judgement.confidence, side="right"))
        return QUARTERS[quarter]

    return name


def reliability(pairs: Sequence[Comparison], seed: int) -> tuple[Bin, ...]:
    """What the model says, sigmoid(|margin|), against how often it is right, in tenths from 50 to 100 %; empty bins are
    left out."""
    binned: dict[int, list[Comparison]] = {}
    for pair in pairs:
        place = min(int((_confidence(pair) - 0.5) * 2 * NUM_BINS), NUM_BINS - 1)
        binned.setdefault(place, []).append(pair)
    width = 0.5 / NUM_BINS
    return tuple(
        Bin(
            0.5 + place * width,
            0.5 + (place + 1) * width,
            sum(map(_confidence, some)) / len(some),
            accuracy(some, seed),
        )
        for place, some in sorted(binned.items())
    )


def calibration_error(bins: Sequence[Bin]) -> float:
    """ECE (Guo et al. 2017): the mean distance of confidence and accuracy, each bin by its pairs."""
    total = sum(one.accuracy.pairs for one in bins)
    return sum(one.accuracy.pairs * abs(one.confidence - one.accuracy.value) for one in bins) / total


def lengths(scored: Sequence[Scored], pairs: Sequence[Comparison], seed: int) -> Lengths:
    uneven = [pair for pair in pairs if pair.lengths[0] != pair.lengths[1]]

    def preferred(by_model: bool) -> Share | None:
        if not uneven:
            return None
        return share(uneven, lambda pair: _prefers_longer(pair, by_model=by_model), seed)

    return Lengths(
        correlation=_correlation(scored, seed, is_within=False),
        correlation_within=_correlation(scored, seed, is_within=True),
        labelers_prefer_longer=preferred(by_model=False),
        model_prefers_longer=preferred(by_model=True),
        groups=groups(pairs, _length_name, seed),
    )


def positions(pairs: Sequence[Comparison], seed: int) -> Positions | None:
    """None if the data do not say where answers were shown."""
    known = [pair for pair in pairs if pair.is_better_shown_first is not None]
    if not known:
        return None
    return Positions(
        labelers_prefer_first=share(known, lambda pair: float(bool(pair.is_better_shown_first)), seed),
        model_prefers_first=share(
            known, lambda pair: pair.credit if pair.is_better_shown_first else 1 - pair.credit, seed
        ),
        groups=groups(
            known, lambda pair: f"better one shown {'first' if pair.is_better_shown_first else 'later'}", seed
        ),
    )


@dataclass(frozen=True)
class Disagreement:
    """How far the members of an ensemble are apart: the mean spread of their scores for an answer, each member's
    accuracy, and that of the whole where all members choose alike and where they do not."""

    spread: float
    members: tuple[Share, ...]
    agreed: Share | None
    divided: Share | None


def disagreement(scored: Sequence[Scored], pairs: Sequence[Comparison], seed: int) -> Disagreement | None:
    """None for a single model."""
    if not scored or len(scored[0].members) < 2:
        return None
    spreads = [float(np.std(column)) for one in scored for column in zip(*one.members, strict=True)]
    alike = [pair for pair in pairs if len({np.sign(margin) for margin in pair.members}) == 1]
    split = [pair for pair in pairs if len({np.sign(margin) for margin in pair.members}) > 1]
    members = tuple(
        share(pairs, lambda pair, n=number: 0.5 + 0.5 * float(np.sign(pair.members[n])), seed)  # type: ignore[misc]
        for number in range(len(scored[0].members))
    )
    return Disagreement(
        sum(spreads) / len(spreads),
        members,
        accuracy(alike, seed) if alike else None,
        accuracy(split, seed) if split else None,
    )


@dataclass(frozen=True)
class Probed:
    """What a probe came to over n prompts: how often the altered answer is scored above the best one (a healthy model:
    well below half), and by how much the score changes (the spread of the training answers is 1)."""

    name: str
    what: str
    n: int
    fooled: Share | None
    change: Share | None

    @property
    def verdict(self) -> str:
        if self.fooled is None:
            return "does not apply"
        if self.fooled.high < 0.5:
            return "resists"
        return "FOOLED" if self.fooled.low > 0.5 else "undecided"


def probed(name: str, what: str, changes: Sequence[float], seed: int) -> Probed:
    """`changes` are the score of the altered answer minus that of the best one, one a prompt."""
    if not changes:
        return Probed(name, what, 0, None, None)
    n = len(changes)
    ones, wins = np.ones(n), 0.5 + 0.5 * np.sign(np.asarray(changes))
    fooled = bootstrap_ratio(wins, ones, seed=seed, num_resamples=RESAMPLES)
    change = bootstrap_ratio(np.asarray(changes), ones, seed=seed, num_resamples=RESAMPLES)
    return Probed(name, what, n, _share(wilson(fooled, n), n, n), _share(change, n, n))


def wilson(found: Interval, n: int) -> Interval:
    """`found`, its bounds at least those of Wilson 1927: where all n agree, a bootstrap has no spread at all."""
    z2 = 1.959964**2
    centre = (found.value + z2 / (2 * n)) / (1 + z2 / n)
    reach = math.sqrt(z2) / (1 + z2 / n) * math.sqrt(found.value * (1 - found.value) / n + z2 / (4 * n * n))
    return Interval(found.value, min(found.low, max(0.0, centre - reach)), max(found.high, min(1.0, centre + reach)))


def _share(found: Interval, pairs: int, prompts: int) -> Share:
    return Share(found.value, found.low, found.high, pairs, prompts)


def _confidence(pair: Comparison) -> float:
    return 1 / (1 + math.exp(-min(abs(pair.margin), 700.0)))


def _prefers_longer(pair: Comparison, *, by_model: bool) -> float:
    is_better_longer = float(pair.lengths[0] > pair.lengths[1])
    if not by_model:
        return is_better_longer
    return pair.credit if is_better_longer else 1 - pair.credit


def _length_name(pair: Comparison) -> str:
    better, worse = pair.lengths
    if abs(better - worse) <= MATCHED_LENGTHS * max(better, worse):
        return "about as long (within 10 %)"
    return "better one longer" if better > worse else "better one shorter"


def _correlation(scored: Sequence[Scored], seed: int, *, is_within: bool) -> Share:
    """Pearson's r of characters and score, over answers; within a prompt after subtracting its means."""
    columns = []
    for one in scored:
        x = np.asarray([len(text) for text in one.ranking.completions], dtype=np.float64)
        y = np.asarray(one.scores)
        columns.append((x - x.mean(), y - y.mean()) if is_within else (x, y))

    def of(weights_RN: np.ndarray) -> np.ndarray:
        drawn = [np.repeat(np.arange(len(columns)), row.astype(np.int64)) for row in weights_RN]
        return np.array(
            [pearson(*(np.concatenate([columns[n][side] for n in some]) for side in (0, 1))) for some in drawn]
        )

    found = bootstrap(of, len(columns), seed=seed, num_resamples=RESAMPLES // 8)
    return _share(found, sum(len(x) for x, _ in columns), len(columns))
