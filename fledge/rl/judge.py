"""Asking reward models: scores of ranked answers, how good the ranking is, and a common scale for scores.

Source: Ouyang et al. 2022 (2203.02155), section 3.5, appendix C.2 (accuracy, bias so that a reference averages 0);
Ziegler et al. 2019 (1909.08593), section 2.2 (mean 0 and spread 1 on the reference policy's samples); Naeini et al.
2015 (calibration error).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fledge.models.scalar import ScalarModel
from fledge.objectives.ranking import KWiseRanking, RankedIds, last_scores
from fledge.train.device import precision
from fledge.types import Metrics

# Answers whose lengths differ by at most this share of the longer one count as equally long.
LENGTH_MATCH = 0.1
CALIBRATION_BINS = 10


@torch.no_grad()
def score_rankings(
    model: ScalarModel, examples: Sequence[RankedIds], objective: KWiseRanking, *, prompts_per_batch: int
) -> list[list[float]]:
    """One score a completion of every ranking, in their order."""
    device = model.mean.device
    flat: list[float] = []
    for start in range(0, len(examples), prompts_per_batch):
        part = examples[start : start + prompts_per_batch]
        with precision(device):
            scores_N = last_scores(model, objective.collate(part).to(device), objective.region)
        flat += scores_N[: sum(len(example.completions) for example in part)].tolist()
    scores = iter(flat)
    return [[next(scores) for _ in example.completions] for example in examples]


def normalise_on(model: ScalarModel, scores: Sequence[float]) -> None:
    """Shift and scale `model` so that `scores`, which it gave a moment ago, would have mean 0 and spread 1.

    Give it the scores of the reference policy's samples: then a score of -1 for an answer without an end is one
    spread worse than usual. ValueError if fewer than two scores differ.
    """
    values = np.asarray(scores, dtype=np.float64)
    model.normalise(float(values.mean()), float(values.std()))


@dataclass(frozen=True)
class _Pair:
    """Two answers of one prompt that do not tie."""

    gap: float  # score of the better one minus that of the other
    lengths: tuple[int, int]
    makers: tuple[str, str]


def ranking_report(
    examples: Sequence[RankedIds],
    scores: Sequence[Sequence[float]],
    makers: Sequence[Sequence[str]] | None = None,
) -> Metrics:
    """How well `scores` order the answers: see docs/metrics.md. Every strict pair counts once, equal scores half.

    Figures without anything to count are left out.
    `makers[i][k]` names who wrote answer k of example i; with it, accuracy is also told for every pair of makers.
    """
    named = makers or [[""] * len(example.ranks) for example in examples]
    pairs = [pair for triple in zip(examples, scores, named, strict=True) for pair in _pairs(*triple)]
    matched = [pair for pair in pairs if _is_matched(pair)]
    lengths = [len(completion) for example in examples for completion in example.completions]
    report = {
        "accuracy": _accuracy(pairs),
        "accuracy_length_matched": _accuracy(matched),
        "pairs": float(len(pairs)),
        "pairs_length_matched": float(len(matched)),
        "calibration_error": calibration_error([pair.gap for pair in pairs]),
        "length_correlation": _correlation(lengths, [score for row in scores for score in row]),
    }
    by_makers: dict[tuple[str, str], list[_Pair]] = defaultdict(list)
    for pair in pairs if makers is not None else []:
        by_makers[pair.makers].append(pair)
    report = {name: figure for name, figure in report.items() if not math.isnan(figure)}
    by_name = {f"accuracy/{a}_over_{b}": _accuracy(some) for (a, b), some in sorted(by_makers.items())}
    return report | by_name


def calibration_error(gaps: Sequence[float]) -> float:
    """Expected calibration error of sigmoid(gap) as the probability that the better answer wins; NaN for no pair.

    Each pair is looked at from the side the model favours: bins of confidence 0.5 to 1, against how often it is right.
    """
    if not gaps:
        return math.nan
    gap = np.asarray(gaps, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.minimum(np.abs(gap), 50.0)))
    is_right = np.where(gap == 0, 0.5, gap > 0)
    bins = np.minimum(((confidence - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    sums = [abs((confidence[bins == b] - is_right[bins == b]).sum()) for b in range(CALIBRATION_BINS)]
    return float(sum(sums) / len(gap))


def _pairs(example: RankedIds, scores: Sequence[float], makers: Sequence[str]) -> Iterator[_Pair]:
    ids, ranks = example.completions, example.ranks
    for i in range(len(ranks)):
        for j in range(len(ranks)):
            if ranks[i] < ranks[j]:
                yield _Pair(scores[i] - scores[j], (len(ids[i]), len(ids[j])), (makers[i], makers[j]))


def _is_matched(pair: _Pair) -> bool:
    return abs(pair.lengths[0] - pair.lengths[1]) <= LENGTH_MATCH * max(pair.lengths)


def _accuracy(pairs: Sequence[_Pair]) -> float:
    if not pairs:
        return math.nan
    return sum(0.5 if pair.gap == 0 else float(pair.gap > 0) for pair in pairs) / len(pairs)


def _correlation(lengths: Sequence[float], scores: Sequence[float]) -> float:
    if len(lengths) < 2 or np.std(lengths) == 0 or np.std(scores) == 0:
        return math.nan
    return float(np.corrcoef(lengths, scores)[0, 1])
