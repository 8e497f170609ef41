"""The health of a reward model: known answers for every figure, and probes that do what they say."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from fledge.errors import DataError
from fledge.evals import reward_health as health
from fledge.evals.bootstrap import Interval
from fledge.evals.reward_probes import PROBES, Case, cut_off, is_chinese, very_long
from fledge.types import Conversation, Judgement, Provenance, Ranking

PROBE = {probe.name: probe for probe in PROBES}


def scored(
    scores: Sequence[float],
    *,
    texts: Sequence[str] = ("good answer", "bad answer"),
    ranks: Sequence[int] = (1, 2),
    source: str = "here",
    judgement: Judgement | None = None,
    shown: tuple[int, ...] | None = None,
    members: tuple[tuple[float, ...], ...] = (),
) -> health.Scored:
    count = len(scores)
    makers = tuple("abcdefghi"[:count])
    ranking = Ranking(
        Conversation.of(("user", "how?")), tuple(texts), tuple(ranks), (True,) * count, makers,
        Provenance(source, "1", "CC0"), judgement, shown=shown,
    )  # fmt: skip
    return health.Scored(ranking, tuple(scores), members)


RIGHT, WRONG = (1.0, 0.0), (0.0, 1.0)


def test_accuracy_counts_pairs_and_prompts_and_equal_scores_half() -> None:
    some = [scored(RIGHT), scored(RIGHT), scored(WRONG), scored((0.5, 0.5))]
    found = health.accuracy(health.comparisons(some), seed=0)
    assert (found.value, found.pairs, found.prompts) == (0.625, 4, 4)
    assert found.low < 0.625 < found.high


def test_a_ranking_gives_all_its_pairs_but_ties() -> None:
    one = scored((3.0, 2.0, 1.0), texts=("a", "b", "c"), ranks=(1, 2, 2))
    pairs = health.comparisons([one])
    assert [(pair.better, pair.worse, pair.margin) for pair in pairs] == [(0, 1, 1.0), (0, 2, 2.0)]
    with pytest.raises(DataError, match="nothing to be right about"):
        health.comparisons([scored(RIGHT, ranks=(1, 1))])
    with pytest.raises(DataError, match="not a number"):
        health.comparisons([scored((math.nan, 0.0))])


def test_certainty_is_never_claimed_of_few_prompts() -> None:
    few = health.accuracy(health.comparisons([scored(RIGHT)] * 5), seed=0)
    assert few.value == few.high == 1.0
    assert few.low == pytest.approx(0.5655, abs=1e-3)  # Wilson 1927 for 5 of 5
    assert health.wilson(Interval(0.5, 0.5, 0.5), 4).low == pytest.approx(0.1500, abs=1e-3)


def test_c18_groups_are_by_source_labeler_makers_and_confidence() -> None:
    ann = Judgement("human", "ann", confidence=9)
    bot = Judgement("ai", "m", confidence=1)
    some = [scored(RIGHT, judgement=ann)] * 3 + [scored(WRONG, source="there", judgement=bot)]
    pairs = health.comparisons(some)
    named = {g.name: (g.accuracy.value, g.accuracy.pairs) for g in health.groups(pairs, health.source_of, 0)}
    assert named == {"here": (1.0, 3), "there": (0.0, 1)}
    assert [g.name for g in health.groups(pairs, health.labeler_of, 0)] == ["ann", "m (ai)"]
    assert [g.name for g in health.groups(pairs, health.makers_of, 0)] == ["a over b"]
    assert [(g.name, g.accuracy.value) for g in health.by_confidence(pairs, 0)] == [("1", 0.0), ("9", 1.0)]
    assert health.groups(health.comparisons([scored(RIGHT)]), health.labeler_of, 0) == ()


def test_c18_labelers_that_the_model_never_learned_from_are_told_together() -> None:
    def by(name: str, scores: tuple[float, ...] = RIGHT) -> health.Scored:
        return scored(scores, judgement=Judgement("human", name))

    trained = [by("ann").ranking, by("bea").ranking]
    pairs = health.comparisons([by("ann"), by("bea"), by("cem", WRONG), by("dan"), scored(RIGHT)])
    found = {g.name: (g.accuracy.value, g.accuracy.pairs) for g in health.by_standing(pairs, trained, 0)}
    assert found == {health.OWN_LABELERS: (1.0, 2), health.HELD_OUT_LABELERS: (0.5, 2)}
    assert health.by_standing(pairs, [one.ranking for one in map(by, ("ann", "bea", "cem", "dan"))], 0) == ()


def test_many_levels_of_confidence_are_told_in_quarters() -> None:
    some = [scored(RIGHT, judgement=Judgement(confidence=float(level))) for level in range(40)]
    found = health.by_confidence(health.comparisons(some), 0)
    assert [group.name for group in found] == list(health.QUARTERS)
    assert [group.accuracy.pairs for group in found] == [10, 10, 10, 10]


def test_a_model_whose_margins_are_log_odds_is_calibrated() -> None:
    rng = random.Random(0)
    some = []
    for _ in range(3000):
        odds = rng.gauss(0, 2)
        is_right = rng.random() < 1 / (1 + math.exp(-odds))
        some.append(scored((odds, 0.0) if is_right else (0.0, odds)))
    bins = health.reliability(health.comparisons(some), seed=0)
    assert health.calibration_error(bins) < 0.03
    for one in bins:
        assert one.low <= one.confidence <= one.high
        assert abs(one.accuracy.value - one.confidence) < 0.1
    sure = health.reliability(health.comparisons([scored((9.0, 0.0)), scored((0.0, 9.0))]), seed=0)
    assert health.calibration_error(sure) == pytest.approx(0.5, abs=1e-3)


def test_a_model_that_likes_length_is_told_from_its_labelers() -> None:
    rng = random.Random(0)
    some = []
    for n in range(60):
        texts = ("word " * rng.randint(1, 9), "word " * rng.randint(10, 20))
        some.append(scored([len(text) / 50 for text in texts], texts=texts, ranks=(1, 2) if n % 2 else (2, 1)))
    pairs = health.comparisons(some)
    found = health.lengths(some, pairs, seed=0)
    assert found.correlation.value == pytest.approx(1.0)
    assert found.correlation_within.value == pytest.approx(1.0)
    assert found.labelers_prefer_longer is not None
    assert found.model_prefers_longer is not None
    assert found.labelers_prefer_longer.value == 0.5
    assert found.model_prefers_longer.value == 1.0
    assert {g.name: g.accuracy.value for g in found.groups} == {"better one longer": 1.0, "better one shorter": 0.0}
    even = [scored(RIGHT, texts=("same", "size"))]
    assert health.lengths(even, health.comparisons(even), 0).model_prefers_longer is None


def test_a_liking_for_the_first_place_is_told() -> None:
    some = [scored(RIGHT, shown=(1, 2))] * 6 + [scored(WRONG, shown=(2, 1))] * 2
    found = health.positions(health.comparisons(some), 0)
    assert found is not None
    assert found.labelers_prefer_first.value == 0.75
    assert found.model_prefers_first.value == 1.0
    assert {g.name: g.accuracy.value for g in found.groups} == {
        "better one shown first": 1.0, "better one shown later": 0.0
    }  # fmt: skip
    assert health.positions(health.comparisons([scored(RIGHT)]), 0) is None


def test_members_of_an_ensemble_are_told_apart() -> None:
    some = [scored(RIGHT, members=(RIGHT, RIGHT)), scored((0.5, 0.5), members=(RIGHT, WRONG))]
    found = health.disagreement(some, health.comparisons(some), 0)
    assert found is not None
    assert found.spread == pytest.approx(0.25)
    assert [member.value for member in found.members] == [1.0, 0.5]
    assert found.agreed is not None
    assert found.divided is not None
    assert (found.agreed.pairs, found.divided.pairs) == (1, 1)
    assert health.disagreement([scored(RIGHT)], health.comparisons([scored(RIGHT)]), 0) is None


def test_a_probe_is_resisted_fooled_or_undecided_by_its_interval() -> None:
    assert health.probed("p", "", [-1.0] * 20, 0).verdict == "resists"
    assert health.probed("p", "", [1.0] * 20, 0).verdict == "FOOLED"
    assert health.probed("p", "", [1.0, -1.0] * 5, 0).verdict == "undecided"
    assert health.probed("p", "", [1.0, 1.0, -1.0], 0).verdict == "undecided"  # more often than not is not surely
    assert health.probed("p", "", [-1.0, -1.0, 1.0], 0).verdict == "undecided"
    assert health.probed("p", "", [-1.0], 0).verdict == "undecided"  # one prompt proves nothing
    assert health.probed("p", "", [], 0).verdict == "does not apply"
    found = health.probed("p", "", [2.0, -1.0], 0)
    assert found.fooled is not None
    assert found.change is not None
    assert (found.n, found.fooled.value, found.change.value) == (2, 0.5, 0.5)


ENGLISH = Case("how do you do?", "I am fine, thank you very much.", "no", "Paris.", lambda text: len(text) < 200)
CHINESE = Case("你好吗？", "我很好，谢谢你的关心。", "不", "北京。", lambda text: len(text) < 100)


@pytest.mark.parametrize("case", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_every_probe_alters_the_answer_as_it_says(case: Case) -> None:
    made = {name: probe.make(case) for name, probe in PROBE.items()}
    assert made["empty answer"] == ""
    assert made["prompt copied"] == case.asked
    assert made["another question's answer"] == case.elsewhere
    assert str(made["answer twice"]).count(case.best) == 2
    assert str(made["very long"]).count(case.best) >= 3
    assert case.fits(str(made["very long"]))
    assert case.best in str(made["flattery around it"])
    assert case.worst in str(made["worst answer, flattered"])
    assert is_chinese(str(made["flattery around it"])) == is_chinese(case.best)
    assert case.best.startswith(str(made["cut off"]))
    assert 0 < len(str(made["cut off"])) < len(case.best)
    assert str(made["code block noise"]).startswith(case.best)
    assert all(text != case.best for text in made.values())


def test_a_probe_that_does_not_apply_makes_nothing() -> None:
    short = Case("a", "yes", "no", "b", lambda text: False)
    assert cut_off(short) is None
    assert very_long(short) is None
