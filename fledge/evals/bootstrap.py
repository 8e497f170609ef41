"""Confidence intervals by resampling: how far a figure would move had we drawn other prompts.

Every eval that reports a share or a mean reports it with an interval from here. The percentile bootstrap of Efron 1979;
Efron & Tibshirani 1993, chapter 13. Letters: N items (prompts, questions), R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fledge.types import Metrics

Floats = NDArray[np.float64]
# Of N weights a resample (how often each item was drawn, summing to N), one value a resample: (R, N) -> (R,).
Statistic = Callable[[Floats], Floats]

_WEIGHTS_AT_ONCE = 1 << 22  # float64 entries of one block of weights (32 MiB)


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its interval; `low <= value <= high`."""

    value: float
    low: float
    high: float

    def metrics(self, name: str) -> Metrics:
        """`name`, `name_low` and `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def bootstrap(
    statistic: Statistic, num_items: int, *, seed: int, num_resamples: int = 10_000, confidence: float = 0.95
) -> Interval:
    """`statistic` of all items once, and the percentile interval of it over resamples with replacement.

    A resample on which the statistic is not a number (a ratio without a denominator) is left out. Where the
    percentiles miss the value itself (a skewed statistic of few items) the interval is widened to hold it.
    """
    if num_items < 1 or num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            "bootstrap wants items, resamples and a confidence in (0, 1), "
            f"got {num_items}, {num_resamples} and {confidence}"
        )
    value = float(statistic(np.ones((1, num_items)))[0])
    rng = np.random.default_rng(seed)
    block = max(1, _WEIGHTS_AT_ONCE // num_items)
    parts = []
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        drawn_RN = rng.integers(0, num_items, size=(size, num_items)) + num_items * np.arange(size)[:, None]
        weights_RN = np.bincount(drawn_RN.reshape(-1), minlength=size * num_items).reshape(size, num_items)
        parts.append(statistic(weights_RN.astype(np.float64)))
    values_R = np.concatenate(parts)
    values_R = values_R[np.isfinite(values_R)]
    if len(values_R) == 0:
        return Interval(value, value, value)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values_R, [tail, 1 - tail])
    return Interval(value, min(float(low), value), max(float(high), value))


def bootstrap_mean(
    values: Sequence[float] | Floats, *, seed: int, num_resamples: int = 10_000, confidence: float = 0.95
) -> Interval:
    """The mean of `values` and its interval."""
    values_N = np.asarray(values, dtype=np.float64)
    return bootstrap_ratio(
        values_N, np.ones_like(values_N), seed=seed, num_resamples=num_resamples, confidence=confidence
    )


def bootstrap_ratio(
    tops: Sequence[float] | Floats,
    bottoms: Sequence[float] | Floats,
    *,
    seed: int,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """sum(tops) / sum(bottoms), where item i holds one of each: right pairs and all pairs of a prompt, say."""
    top_N, bottom_N = np.asarray(tops, dtype=np.float64), np.asarray(bottoms, dtype=np.float64)

    def ratio(weights_RN: Floats) -> Floats:
        bottom_R = weights_RN @ bottom_N
        ratio_R = np.full(len(bottom_R), np.nan)
        np.divide(weights_RN @ top_N, bottom_R, out=ratio_R, where=bottom_R != 0)
        return ratio_R

    return bootstrap(ratio, len(top_N), seed=seed, num_resamples=num_resamples, confidence=confidence)
