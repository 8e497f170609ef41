"""Win rate: how often a judge likes our answer better than the other one, on prompts neither side was trained on.

Ties count half for each side. The judge is never the reward model that a policy was trained against. Sources: Dubois
et al. 2024, "Length-Controlled AlpacaEval" (section 3, the length-controlled rate); Zheng et al. 2023 (MT-Bench),
section 3.4 (both orders, against position bias). Letters: N prompts, R resamples.

Length-controlled: a logistic regression of the preference on a constant and the length difference,

    P(ours wins) = sigmoid(theta + phi tanh((len_ours - len_theirs) / std)),

read at no difference: sigmoid(theta). The paper's term for the difficulty of a prompt needs many models and is
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fledge.errors import DataError
from fledge.evals.bootstrap import bootstrap, bootstrap_mean
from fledge.types import Metrics

PromptT = TypeVar("PromptT")
Floats = NDArray[np.float64]
ScalarJudge = Callable[[Sequence[PromptT], Sequence[str]], Sequence[float]]
"""(prompts, answers) -> a score an answer, higher is better."""
PairwiseJudge = Callable[[Sequence[PromptT], Sequence[str], Sequence[str]], Sequence[float]]
"""(prompts, first answers, second answers) -> how much the first is preferred: 1 better, 0.5 a tie, 0 worse."""

# Prior on phi, normal with this deviation: keeps the fit finite where length tells the winner perfectly. The scale of
# Gelman et al. 2008, "A weakly informative default prior for logistic models". theta has none: it would pull to 50 %.
LENGTH_PRIOR_STD = 2.5
_MAX_NEWTON_STEPS, _MAX_STEP, _TOLERANCE = 100, 2.0, 1e-9


def evaluate(
    judge: ScalarJudge[PromptT],
    prompts: Sequence[PromptT],
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    seed: int,
    num_resamples: int = 10_000,
) -> Metrics:
    """Our win rate by a judge that scores each answer on its own, so that both orders come to the same.

    `win_rate` and `win_rate_length_controlled`, each with `_low` and `_high` (95 %, bootstrap over prompts); `wins`,
    `ties`, `losses` (counts); `score_difference` (mean, ours minus theirs); `length_difference` (mean, characters).
    """
    _check(prompts, ours, theirs)
    scores = judge(prompts, ours), judge(prompts, theirs)
    return evaluate_scores(scores, ours, theirs, seed=seed, num_resamples=num_resamples)


def evaluate_scores(
    scores: tuple[Sequence[float], Sequence[float]],
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    seed: int,
    num_resamples: int = 10_000,
) -> Metrics:
    """`evaluate` where the judge has spoken already: `scores` of our answers and of theirs."""
    our_N, their_N = (np.asarray(given, dtype=np.float64) for given in scores)
    if not np.isfinite(our_N).all() or not np.isfinite(their_N).all():
        raise DataError("the judge gave a score that is not a number; the model it runs on is broken")
    preference_N = (np.sign(our_N - their_N) + 1) / 2
    metrics = from_preferences(preference_N, ours, theirs, seed=seed, num_resamples=num_resamples)
    return metrics | {"score_difference": float(np.mean(our_N - their_N))}


def evaluate_pairwise(
    judge: PairwiseJudge[PromptT],
    prompts: Sequence[PromptT],
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    seed: int,
    num_resamples: int = 10_000,
) -> Metrics:
    """Our win rate by a judge that sees two answers side by side.

    Both orders are judged and averaged; which of them comes first is drawn for every prompt. Metrics as `evaluate`
    (without `score_difference`), and `first_position_rate`: how much the judge likes what stands first; 0.5 is fair.
    """
    _check(prompts, ours, theirs)
    is_ours_first_N = np.random.default_rng(seed).random(len(prompts)) < 0.5
    mine_N = np.zeros(len(prompts))
    first_rates = []
    for is_ours_N in (is_ours_first_N, ~is_ours_first_N):
        first = [a if is_ours else b for a, b, is_ours in zip(ours, theirs, is_ours_N, strict=True)]
        second = [b if is_ours else a for a, b, is_ours in zip(ours, theirs, is_ours_N, strict=True)]
        liked_N = np.asarray(judge(prompts, first, second), dtype=np.float64)
        if not np.all((liked_N >= 0) & (liked_N <= 1)):
            raise DataError("a pairwise judge answers with numbers from 0 to 1")
        mine_N += np.where(is_ours_N, liked_N, 1 - liked_N) / 2
        first_rates.append(float(liked_N.mean()))
    metrics = from_preferences(mine_N, ours, theirs, seed=seed, num_resamples=num_resamples)
    return metrics | {"first_position_rate": sum(first_rates) / 2}


def from_preferences(
    preferences: Sequence[float] | Floats,
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    seed: int,
    num_resamples: int = 10_000,
) -> Metrics:
    """The figures of `evaluate` from judgements already made: 1 ours is better, 0.5 a tie, 0 theirs is better."""
    _check(preferences, ours, theirs)
    preference_N = np.asarray(preferences, dtype=np.float64)
    difference_N = np.asarray([len(a) - len(b) for a, b in zip(ours, theirs, strict=True)], dtype=np.float64)
    spread = float(difference_N.std())
    length_N = np.tanh(difference_N / spread) if spread > 0 else np.zeros_like(difference_N)

    def controlled(weights_RN: Floats) -> Floats:
        return length_controlled(preference_N, length_N, weights_RN)

    plain = bootstrap_mean(preference_N, seed=seed, num_resamples=num_resamples)
    fair = bootstrap(controlled, len(preference_N), seed=seed, num_resamples=num_resamples)
    return (
        plain.metrics("win_rate")
        | fair.metrics("win_rate_length_controlled")
        | {
            "wins": float(np.sum(preference_N > 0.5)),
            "ties": float(np.sum(preference_N == 0.5)),
            "losses": float(np.sum(preference_N < 0.5)),
            "length_difference": float(difference_N.mean()),
        }
    )


def length_controlled(preference_N: Floats, length_N: Floats, weights_RN: Floats) -> Floats:
    """sigmoid(theta) of the regression above for every row of `weights_RN` (how often each prompt counts) -> (R,).

    `length_N` is the length term, in [-1, 1]. Newton's method with bounded steps on all rows at once. Where all
    preferences of a row are 1 (or all 0) no theta fits; the rate is then 1 (or 0) whatever the lengths.
    """
    mean_R = (weights_RN @ preference_N) / weights_RN.sum(axis=1)
    is_mixed_R = (mean_R > 0) & (mean_R < 1)
    weights_RN = weights_RN[is_mixed_R]
    theta_R, phi_R = np.zeros(len(weights_RN)), np.zeros(len(weights_RN))
    precision = 1 / LENGTH_PRIOR_STD**2
    for _ in range(_MAX_NEWTON_STEPS):
        chance_RN = _sigmoid(theta_R[:, None] + phi_R[:, None] * length_N)
        error_RN = weights_RN * (chance_RN - preference_N)
        curve_RN = weights_RN * chance_RN * (1 - chance_RN)
        gradient_theta_R, gradient_phi_R = error_RN.sum(axis=1), error_RN @ length_N + precision * phi_R
        a_R, b_R, c_R = curve_RN.sum(axis=1), curve_RN @ length_N, curve_RN @ length_N**2 + precision
        determinant_R = np.maximum(a_R * c_R - b_R**2, np.finfo(np.float64).tiny)
        step_theta_R = (c_R * gradient_theta_R - b_R * gradient_phi_R) / determinant_R
        step_phi_R = (a_R * gradient_phi_R - b_R * gradient_theta_R) / determinant_R
        longest_R = np.maximum(np.hypot(step_theta_R, step_phi_R), _TOLERANCE)
        scale_R = np.minimum(1.0, _MAX_STEP / longest_R)
        theta_R, phi_R = theta_R - scale_R * step_theta_R, phi_R - scale_R * step_phi_R
        if np.all(longest_R <= _TOLERANCE):
            break
    rate_R: Floats = mean_R.copy()
    rate_R[is_mixed_R] = _sigmoid(theta_R)
    return rate_R


def _sigmoid(x: Floats) -> Floats:
    half: Floats = 0.5 * (1 + np.tanh(0.5 * x))
    return half


def _check(prompts: Sized, ours: Sequence[str], theirs: Sequence[str]) -> None:
    if not len(prompts) == len(ours) == len(theirs):
        raise ValueError(f"{len(prompts)} prompts, {len(ours)} of our answers and {len(theirs)} of theirs")
    if not len(prompts):
        raise DataError("no prompts to judge answers to; hold some out")
