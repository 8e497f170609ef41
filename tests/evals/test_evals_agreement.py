"""Agreement of labelers: the known answers of the literature, chance, missing values, humans beside models."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import DataError
from fledge.evals.agreement import Scale, accuracy, cohen_kappa, evaluate, krippendorff_alpha, verdicts
from fledge.types import Conversation, Judgement, PairExample, Provenance, Ranking

# Krippendorff 2011, section C: four observers, twelve units, missing values.
OBSERVERS = {
    "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    "C": [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
}
UNITS = [
    {name: float(values[u]) for name, values in OBSERVERS.items() if values[u] is not None}  # type: ignore[arg-type]
    for u in range(12)
]


def paired(first: list[float], second: list[float]) -> list[dict[str, float]]:
    return [{"a": a, "b": b} for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize(("scale", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_krippendorffs_example_with_missing_values(scale: Scale, alpha: float) -> None:
    assert krippendorff_alpha(UNITS, scale) == pytest.approx(alpha, abs=5e-4)


def test_alpha_of_krippendorffs_binary_example_of_two_observers() -> None:
    # Section A: ten units; 0.095.
    first = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    second = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert krippendorff_alpha(paired(first, second)) == pytest.approx(0.095, abs=5e-4)  # type: ignore[arg-type]


def test_kappa_of_the_textbook_table() -> None:
    # 20 both yes, 5 only the first, 10 only the second, 15 both no: p_o 0.7, p_e 0.5, kappa 0.4.
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert accuracy(first, second) == 0.7
    assert cohen_kappa(first, second) == pytest.approx(0.4)


def test_perfect_agreement_is_one_opposition_is_minus_one_and_one_sided_labels_are_chance() -> None:
    assert cohen_kappa([0, 1, 1], [0, 1, 1]) == 1
    assert cohen_kappa([0, 1], [1, 0]) == -1
    assert cohen_kappa([1, 1], [1, 1]) == 1
    assert cohen_kappa([0, 1, 0, 1], [1, 1, 1, 1]) == 0
    assert krippendorff_alpha(paired([1, 2, 3], [1, 2, 3]), "ordinal") == 1
    assert krippendorff_alpha(paired([1, 1], [1, 1])) == 1


def test_alpha_without_a_unit_judged_twice_is_not_a_number() -> None:
    assert math.isnan(krippendorff_alpha([{"a": 1.0}, {"b": 2.0}]))
    with pytest.raises(DataError, match="two labelers"):
        evaluate([{"a": 1.0}], seed=0)


def test_labels_of_dice_agree_by_chance() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 3, (2, 4000)).tolist()
    assert abs(cohen_kappa(first, second)) < 0.05
    for scale in ("nominal", "ordinal", "interval"):
        assert abs(krippendorff_alpha(paired(first, second), scale)) < 0.05  # type: ignore[arg-type]


def slow_alpha(ratings: list[dict[str, float]], scale: Scale) -> float:
    """By definition: over all ordered pairs of values, within units and at large."""
    judged = [list(unit.values()) for unit in ratings if len(unit) > 1]
    everything = [value for unit in judged for value in unit]

    def distance(a: float, b: float) -> float:
        if scale == "nominal":
            return float(a != b)
        if scale == "interval":
            return (a - b) ** 2
        low, high = min(a, b), max(a, b)
        between = sum(low <= v <= high for v in everything)
        return (between - (everything.count(a) + everything.count(b)) / 2) ** 2 if a != b else 0.0

    n = len(everything)
    within = sum(
        distance(a, b) / (len(unit) - 1)
        for unit in judged
        for i, a in enumerate(unit)
        for j, b in enumerate(unit)
        if i != j
    )
    at_large = sum(distance(a, b) for i, a in enumerate(everything) for j, b in enumerate(everything) if i != j)
    return 1.0 if at_large == 0 else 1 - (within / n) / (at_large / (n * (n - 1)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from("abcd"), st.sampled_from([1.0, 2.0, 3.0, 7.0]), min_size=2),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(["nominal", "ordinal", "interval"]),
)
def test_alpha_equals_its_definition(ratings: list[dict[str, float]], scale: Scale) -> None:
    assert krippendorff_alpha(ratings, scale) == pytest.approx(slow_alpha(ratings, scale), abs=1e-9)


def test_the_report_names_every_two_labelers_and_holds_its_intervals() -> None:
    metrics = evaluate(UNITS, scale="ordinal", seed=0, num_resamples=200)
    assert metrics["agreement_units"] == 11
    assert metrics["agreement_labelers"] == 4
    assert metrics["agreement_alpha"] == pytest.approx(0.815, abs=5e-4)
    assert metrics["agreement_alpha_low"] <= metrics["agreement_alpha"] <= metrics["agreement_alpha_high"]
    assert metrics["agreement/A~B"] == pytest.approx(8 / 9)
    assert metrics["agreement_units/A~B"] == 9
    assert "agreement_human_ai" not in metrics


def test_models_are_set_beside_humans_and_humans_beside_each_other() -> None:
    def unit(humans: str, model: int) -> dict[str, float]:
        return {f"h{n}": float(value) for n, value in enumerate(humans)} | {"model": float(model)}

    ratings = [unit("111", 1), unit("110", 1), unit("000", 1), unit("10", 0)]
    metrics = evaluate(ratings, is_ai=lambda labeler: labeler == "model", seed=0, num_resamples=100)
    assert metrics["agreement_human_ai"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    # Of (1,1,0): the ones meet a split majority (a half each), the zero disagrees with both.
    assert metrics["agreement_human_human"] == pytest.approx((1 + 1 / 3 + 1 + 0) / 4)


def test_pairs_and_rankings_of_the_same_answers_become_one_unit() -> None:
    prompt, origin = Conversation.of(("user", "Q")), Provenance("s", "1", "MIT")

    def judged(labeler: str, kind: str = "human") -> Judgement:
        return Judgement(kind, labeler)  # type: ignore[arg-type]

    labels: list[PairExample | Ranking] = [
        PairExample(prompt, "b", "a", origin, judgement=judged("ann")),
        PairExample(prompt, "a", "b", origin, 0.4, judgement=judged("model", "ai")),
        PairExample(prompt, "a", "b", origin, 0.5),
        Ranking(prompt, ("a", "b", "c"), (1, 2, 2), (True,) * 3, ("m",) * 3, origin, judged("bo")),
    ]
    units = verdicts(labels)
    assert {"ann": 0.0, "model": 0.0, "human": 0.5, "bo": 1.0} in units
    assert {"bo": 1.0} in units
    assert {"bo": 0.5} in units
    assert len(units) == 3


def test_lists_of_different_length_and_labels_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="equally long"):
        cohen_kappa([1], [1, 2])
    with pytest.raises(DataError, match="not a number"):
        krippendorff_alpha([{"a": float("nan"), "b": 1.0}])
