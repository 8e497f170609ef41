"""Do labelers agree: with each other, and humans with AI labels? Accuracy, Cohen's kappa, Krippendorff's alpha.

Anchors: InstructGPT's labelers agree on 72.6 +- 1.5 % of comparisons, held-out ones on 77.3 +- 1.3 % (Ouyang et al.
2022, section 3.4); a reward model cannot be expected to do better. Kappa after Cohen 1960; alpha after Krippendorff
2011, "Computing Krippendorff's Alpha-Reliability", with missing values. Letters: U units, C values.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fledge.errors import DataError
from fledge.evals.bootstrap import bootstrap, bootstrap_mean
from fledge.types import Judgement, Metrics, PairExample, Ranking, UnpairedExample

Floats = NDArray[np.float64]
ValueT = TypeVar("ValueT", bound=Hashable)
Scale = Literal["nominal", "ordinal", "interval"]
Ratings = Sequence[Mapping[str, float]]
"""A unit each (one comparison, one answer): labeler -> value. Labelers who did not judge a unit are not in it."""


def accuracy(first: Sequence[ValueT], second: Sequence[ValueT]) -> float:
    """The share of units on which two labelers say the same."""
    _check_pairs(first, second)
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def cohen_kappa(first: Sequence[ValueT], second: Sequence[ValueT]) -> float:
    """(p_o - p_e) / (1 - p_e): agreement beyond what the two labelers' habits would give by chance.

    1 is perfect, 0 chance. Where chance agreement is certain (both always say one same thing) it is 1.
    """
    observed, count = accuracy(first, second), len(first)
    habits = Counter(first), Counter(second)
    expected = sum(habits[0][value] * habits[1][value] for value in habits[0]) / count**2
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(ratings: Ratings, scale: Scale = "nominal") -> float:
    """1 - D_o / D_e over all values that can be paired: units that two labelers or more judged. NaN if none can be.

    `scale` is that of the values: nominal (any difference counts alike), ordinal (by the ranks between two values),
    interval (by the squared difference). 1 is perfect, 0 chance; where no two values differ at all it is 1.
    """
    values, counts_UC = _counts(ratings)
    if not len(counts_UC):
        return float("nan")
    return float(_alpha(counts_UC, _distances(values, counts_UC.sum(axis=0), scale))[0])


def evaluate(
    ratings: Ratings,
    *,
    scale: Scale = "nominal",
    is_ai: Callable[[str], bool] = lambda labeler: False,
    seed: int,
    num_resamples: int = 2_000,
) -> Metrics:
    """How labelers agree, with 95 % intervals by bootstrap over units.

    `agreement` (share of equal values over all pairs of labelers on a unit), `agreement_alpha`, each with `_low` and
    `_high`; `agreement_units` and `agreement_labelers`; for labelers a, b with a unit in common `agreement/a~b`,
    `agreement_kappa/a~b` and `agreement_units/a~b`. If `is_ai` holds for some and not for others:
    `agreement_human_ai` (with bounds; each unit's human majority against its AI majority, split votes counting
    half) and `agreement_human_human`, the same between a human and the majority of the others: the ceiling.
    """
    judged = [unit for unit in ratings if len(unit) > 1]
    if not judged:
        raise DataError("no unit was judged by two labelers; have some judged twice (10 to 20 % is usual)")
    values, counts_UC = _counts(judged)
    equal_U, pairs_U = (counts_UC * (counts_UC - 1)).sum(axis=1), counts_UC.sum(axis=1) * (counts_UC.sum(axis=1) - 1)
    options = {"seed": seed, "num_resamples": num_resamples}
    raw = bootstrap(lambda w: (w @ equal_U) / (w @ pairs_U), len(judged), **options)
    # Distances of ordinal values depend on how often each occurs, so each resample has its own.
    alpha = bootstrap(lambda w: _resampled(w, values, counts_UC, scale), len(judged), **options)
    metrics = {
        **raw.metrics("agreement"),
        **alpha.metrics("agreement_alpha"),
        "agreement_units": float(len(judged)),
        "agreement_labelers": float(len({labeler for unit in judged for labeler in unit})),
    }
    return metrics | _by_pair(judged) | _across(judged, is_ai, seed, num_resamples)


def verdicts(examples: Iterable[PairExample | Ranking | UnpairedExample]) -> list[dict[str, float]]:
    """Units for `evaluate` out of labels: one a prompt and two answers; 1 if the answer that sorts first is better,
    0 if the other is, 0.5 for a tie. A verdict on a single answer is a unit of its own, 1 if it is desirable."""
    units: dict[tuple[Hashable, str, str], dict[str, float]] = defaultdict(dict)
    for example in examples:
        labeler = labeler_of(example.judgement)
        if isinstance(example, UnpairedExample):
            units[example.prompt, example.completion, ""][labeler] = float(example.is_desirable)
            continue
        for better, worse, value in _compared(example):
            low, high = sorted((better, worse))
            units[example.prompt, low, high][labeler] = value if better == low else 1 - value
    return list(units.values())


def labeler_of(judgement: Judgement | None) -> str:
    """Who a label counts as: the labeler, without a name the kind ("human", "ai", "rule")."""
    return (judgement.labeler or judgement.kind) if judgement else "human"


def _compared(example: PairExample | Ranking) -> list[tuple[str, str, float]]:
    """(an answer, another, 1 or 0.5 as the first is better or they tie) for every two answers."""
    if isinstance(example, PairExample):
        value = 0.5 if example.probability == 0.5 else float(example.probability > 0.5)
        return [(example.chosen, example.rejected, value)]
    answers = sorted(zip(example.ranks, example.completions, strict=True))
    return [(a, b, 0.5 if i == j else 1.0) for (i, a), (j, b) in combinations(answers, 2) if a != b]


def _check_pairs(first: Sequence[ValueT], second: Sequence[ValueT]) -> None:
    if len(first) != len(second) or not first:
        raise DataError(f"agreement needs two equally long lists of labels, got {len(first)} and {len(second)}")


def _counts(ratings: Ratings) -> tuple[Floats, Floats]:
    """(the values that occur, sorted; how often each unit has each), of units that two or more judged."""
    judged = [list(unit.values()) for unit in ratings if len(unit) > 1]
    if not all(np.isfinite(value) for unit in judged for value in unit):
        raise DataError("a label is not a number; leave units without a label out instead")
    values = np.unique([value for unit in judged for value in unit]).astype(np.float64)
    counts_UC = np.zeros((len(judged), len(values)))
    for counts_C, unit in zip(counts_UC, judged, strict=True):
        np.add.at(counts_C, np.searchsorted(values, unit), 1)
    return values, counts_UC


def _distances(values: Floats, totals_C: Floats, scale: Scale) -> Floats:
    """delta^2 between every two values (Krippendorff 2011, section E)."""
    if scale == "nominal":
        return 1.0 - np.eye(len(values))
    if scale == "interval":
        return (values[:, None] - values[None, :]) ** 2
    places_C = np.cumsum(totals_C) - totals_C / 2  # sum of n_g from c to k, less half of both ends
    return (places_C[:, None] - places_C[None, :]) ** 2


def _alpha(counts_UC: Floats, distances_CC: Floats, weights_RU: Floats | None = None) -> Floats:
    """alpha of every resample (of all units once, without weights)."""
    weights_RU = np.ones((1, len(counts_UC))) if weights_RU is None else weights_RU
    raters_U = counts_UC.sum(axis=1)
    within_U = np.einsum("uc,ck,uk->u", counts_UC, distances_CC, counts_UC) / (raters_U - 1)
    totals_RC = weights_RU @ counts_UC
    num_values_R = totals_RC.sum(axis=1)
    observed_R = weights_RU @ within_U / num_values_R
    expected_R = np.einsum("rc,ck,rk->r", totals_RC, distances_CC, totals_RC) / (num_values_R * (num_values_R - 1))
    safe_R = np.where(expected_R > 0, expected_R, 1)
    return np.where(expected_R > 0, 1 - observed_R / safe_R, 1.0)


def _resampled(weights_RU: Floats, values: Floats, counts_UC: Floats, scale: Scale) -> Floats:
    if scale != "ordinal":
        return _alpha(counts_UC, _distances(values, counts_UC.sum(axis=0), scale), weights_RU)
    totals_RC = weights_RU @ counts_UC
    rows = [
        _alpha(counts_UC, _distances(values, totals_C, scale), weights_U[None])
        for weights_U, totals_C in zip(weights_RU, totals_RC, strict=True)
    ]
    return np.concatenate(rows)


def _by_pair(judged: Ratings) -> Metrics:
    both: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for unit in judged:
        for a, b in combinations(sorted(unit), 2):
            both[a, b].append((unit[a], unit[b]))
    metrics: Metrics = {}
    for (a, b), said in sorted(both.items()):
        first, second = zip(*said, strict=True)
        metrics[f"agreement/{a}~{b}"] = accuracy(first, second)
        metrics[f"agreement_kappa/{a}~{b}"] = cohen_kappa(first, second)
        metrics[f"agreement_units/{a}~{b}"] = float(len(said))
    return metrics


def _across(judged: Ratings, is_ai: Callable[[str], bool], seed: int, num_resamples: int) -> Metrics:
    """Humans against AI labels, beside humans against the other humans of a unit."""
    between, ceiling = [], []
    for unit in judged:
        humans = [value for labeler, value in sorted(unit.items()) if not is_ai(labeler)]
        models = [value for labeler, value in sorted(unit.items()) if is_ai(labeler)]
        if humans and models:
            between.append(_overlap(_majority(humans), _majority(models)))
        if len(humans) > 1:
            others = [_overlap({value}, _majority(humans[:n] + humans[n + 1 :])) for n, value in enumerate(humans)]
            ceiling.append(sum(others) / len(others))
    if not between:
        return {}
    metrics = bootstrap_mean(between, seed=seed, num_resamples=num_resamples).metrics("agreement_human_ai")
    if ceiling:
        human = bootstrap_mean(ceiling, seed=seed, num_resamples=num_resamples)
        metrics |= human.metrics("agreement_human_human")
    return metrics


def _majority(values: Sequence[float]) -> set[float]:
    """The most frequent value, or all that are."""
    counts = Counter(values)
    return {value for value, count in counts.items() if count == max(counts.values())}


def _overlap(first: set[float], second: set[float]) -> float:
    """The chance that a value drawn from each is the same."""
    return len(first & second) / (len(first) * len(second))
