"""How often a reward model puts the better answer first, by who wrote the two, and what else its score follows.

A pair is two answers of one ranking with different ranks; ties say nothing and are left out. Pairs of about equal
length show what is left when length cannot help. Sources: Ouyang et al. 2022, section 3.5; Guo et al. 2017 (expected
calibration error); Singhal et al. 2023, "A Long Way to Go" (length against reward).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fledge.errors import DataError
from fledge.evals.bootstrap import bootstrap_ratio
from fledge.types import Metrics, Ranking

ScoreRankings = Callable[[Sequence[Ranking]], Sequence[Sequence[float]]]
"""Rankings -> a score for every completion of each."""

MATCHED_LENGTHS = 0.1  # lengths match when they differ by at most this share of the longer one
NUM_BINS = 10  # of confidence, for the calibration error


@dataclass(frozen=True)
class _Pair:
    """One comparison: `margin` is the score of the better answer minus that of the worse one."""

    prompt: int
    margin: float
    makers: str  # "human>sft"
    source: str
    is_length_matched: bool

    @property
    def credit(self) -> float:
        """1 for the right order, 0 for the wrong one, a half where the scores are equal."""
        return 0.5 * (1 + math.copysign(1, self.margin)) if self.margin else 0.5


def evaluate(score: ScoreRankings, rankings: Sequence[Ranking], *, seed: int, limit: int | None = None) -> Metrics:
    """Pair accuracy of a reward model on the first `limit` rankings.

    `accuracy` with `_low` and `_high` (95 %, bootstrap over prompts) and `pairs`; for each two makers a, b where a was
    ranked above b `accuracy/a>b` and `pairs/a>b`, for each source s, if several, `accuracy/s` and `pairs/s`;
    `accuracy_length_matched` and `pairs_length_matched` (no accuracy where there is no such pair); `length_correlation`
    (Pearson, characters against score, over all answers) and `length_correlation_within` (the same after
    subtracting each prompt's means); `calibration_error`. Accuracies of the prompt's pairs weigh each pair alike.
    """
    chosen = rankings[:limit]
    scores = [list(map(float, row)) for row in score(chosen)]
    _check(chosen, scores)
    pairs = [
        pair
        for number, (ranking, row) in enumerate(zip(chosen, scores, strict=True))
        for pair in _pairs(number, ranking, row)
    ]
    if not pairs:
        raise DataError("no ranking holds two answers of different rank; there is nothing to be right about")
    right, total = np.zeros(len(chosen)), np.zeros(len(chosen))
    for pair in pairs:
        right[pair.prompt] += pair.credit
        total[pair.prompt] += 1
    metrics = bootstrap_ratio(right, total, seed=seed).metrics("accuracy") | {"pairs": float(len(pairs))}
    for label, group in _groups(pairs).items():
        metrics |= {f"accuracy/{label}": _accuracy(group), f"pairs/{label}": float(len(group))}
    matched = [pair for pair in pairs if pair.is_length_matched]
    metrics["pairs_length_matched"] = float(len(matched))
    if matched:
        metrics["accuracy_length_matched"] = _accuracy(matched)
    return metrics | _length_correlations(chosen, scores) | {"calibration_error": calibration_error(pairs)}


def calibration_error(pairs: Sequence[_Pair]) -> float:
    """ECE: how far sigmoid(|margin|), the chance the model gives its own choice, is from how often it is right."""
    confidence_P = np.asarray([1 / (1 + math.exp(-min(abs(pair.margin), 700.0))) for pair in pairs])
    credit_P = np.asarray([pair.credit for pair in pairs])
    bin_P = np.minimum(((confidence_P - 0.5) * 2 * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gap_K = np.bincount(bin_P, weights=confidence_P - credit_P, minlength=NUM_BINS)
    return float(np.abs(gap_K).sum() / len(pairs))


def _pairs(number: int, ranking: Ranking, scores: Sequence[float]) -> list[_Pair]:
    found = []
    for i, j in combinations(range(len(scores)), 2):
        if ranking.ranks[i] == ranking.ranks[j]:
            continue
        better, worse = (i, j) if ranking.ranks[i] < ranking.ranks[j] else (j, i)
        lengths = sorted((len(ranking.completions[i]), len(ranking.completions[j])))
        found.append(
            _Pair(
                prompt=number,
                margin=scores[better] - scores[worse],
                makers=f"{ranking.makers[better]}>{ranking.makers[worse]}",
                source=ranking.provenance.source,
                is_length_matched=lengths[1] - lengths[0] <= MATCHED_LENGTHS * lengths[1],
            )
        )
    return found


def _groups(pairs: Sequence[_Pair]) -> dict[str, list[_Pair]]:
    """The pairs of each two makers and, if there are several, of each source."""
    by_makers: defaultdict[str, list[_Pair]] = defaultdict(list)
    by_source: defaultdict[str, list[_Pair]] = defaultdict(list)
    for pair in pairs:
        by_makers[pair.makers].append(pair)
        by_source[pair.source].append(pair)
    return {**by_makers, **(by_source if len(by_source) > 1 else {})}


def _accuracy(pairs: Sequence[_Pair]) -> float:
    return sum(pair.credit for pair in pairs) / len(pairs)


def _length_correlations(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> Metrics:
    lengths = [np.asarray([len(text) for text in ranking.completions], dtype=np.float64) for ranking in rankings]
    rewards = [np.asarray(row) for row in scores]
    centred = [[row - row.mean() for row in rows] for rows in (lengths, rewards)]
    return {
        "length_correlation": pearson(np.concatenate(lengths), np.concatenate(rewards)),
        "length_correlation_within": pearson(np.concatenate(centred[0]), np.concatenate(centred[1])),
    }


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation; 0 where one side does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else 0.0


def _check(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> None:
    for ranking, row in zip(rankings, scores, strict=True):
        if len(row) != len(ranking.completions):
            raise ValueError(f"{len(row)} scores for {len(ranking.completions)} completions")
        if not all(map(math.isfinite, row)):
            raise DataError("the reward model gave a score that is not a number; its checkpoint is broken")
