"""Asking reward models: accuracy, its length-matched twin, calibration, and the common scale."""

from __future__ import annotations

import numpy as np
import pytest
import rl_toy as toy
import torch

from fledge.models.scalar import ScalarModel
from fledge.objectives.ranking import KWiseRanking, RankedIds, last_scores
from fledge.rl.judge import calibration_error, normalise_on, ranking_report, score_rankings


def example(*lengths: int, ranks: tuple[int, ...]) -> RankedIds:
    return RankedIds((0, 3), tuple((4,) * length for length in lengths), ranks)


def model() -> ScalarModel:
    return ScalarModel.from_trunk("llama", toy.language_model(0), generator=torch.Generator().manual_seed(1))


def test_c18_accuracy_counts_every_strict_pair_once_and_equal_scores_half():
    report = ranking_report([example(3, 3, 3, ranks=(1, 2, 2))], [[1.0, 0.5, 1.0]])
    assert report["pairs"] == 2
    assert report["accuracy"] == pytest.approx(0.75)


def test_c18_length_matched_accuracy_sees_only_pairs_of_about_equal_length():
    report = ranking_report([example(20, 19, 40, ranks=(1, 2, 3))], [[0.0, 1.0, -1.0]])
    assert report["pairs_length_matched"] == 1
    assert report["accuracy_length_matched"] == 0
    assert report["accuracy"] == pytest.approx(2 / 3)
    assert "accuracy_length_matched" not in ranking_report([example(1, 9, ranks=(1, 2))], [[0.0, 1.0]])


def test_c18_accuracy_is_told_for_every_pair_of_makers():
    report = ranking_report(
        [example(3, 3, 3, ranks=(1, 2, 3))], [[1.0, 2.0, 0.0]], [["human", "sft", "base"]]
    )
    told = {name: figure for name, figure in report.items() if name.startswith("accuracy/")}
    assert told == {"accuracy/human_over_base": 1, "accuracy/human_over_sft": 0, "accuracy/sft_over_base": 1}


def test_c18_length_correlation_shows_a_judge_of_length():
    report = ranking_report([example(2, 4, 8, ranks=(1, 2, 3))], [[2.0, 4.0, 8.0]])
    assert report["length_correlation"] == pytest.approx(1)


def test_c18_calibration_error_is_zero_for_honest_confidence_and_large_for_a_boaster():
    gap = float(np.log(0.75 / 0.25))
    assert calibration_error([gap, gap, gap, -gap]) == pytest.approx(0, abs=1e-9)
    assert calibration_error([20.0, -20.0]) == pytest.approx(0.5, abs=1e-6)


def test_scores_do_not_depend_on_how_rankings_are_batched():
    examples = [example(2, 5, ranks=(1, 2)), example(1, 3, 4, ranks=(1, 2, 3)), example(6, 2, ranks=(2, 1))]
    objective = KWiseRanking(12, toy.PAD, num_rows=8)
    judge = model()
    together = score_rankings(judge, examples, objective, prompts_per_batch=3)
    apart = score_rankings(judge, examples, objective, prompts_per_batch=1)
    assert [len(row) for row in together] == [2, 3, 2]
    for row, expected in zip(together, apart, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        first = last_scores(judge, objective.collate(examples[:1]))
    assert together[0] == pytest.approx(first[:2].tolist(), abs=1e-5)


def test_c17_scores_that_set_the_scale_have_mean_zero_and_spread_one_afterwards():
    examples = [example(n, n + 3, ranks=(1, 2)) for n in range(1, 8)]
    objective, judge = KWiseRanking(16, toy.PAD), model()
    flat = [s for row in score_rankings(judge, examples, objective, prompts_per_batch=4) for s in row]
    normalise_on(judge, flat)
    again = np.array(
        [s for row in score_rankings(judge, examples, objective, prompts_per_batch=4) for s in row]
    )
    assert abs(again.mean()) < 1e-3
    assert again.std() == pytest.approx(1, abs=1e-3)


def test_scores_that_are_all_equal_cannot_set_a_scale():
    with pytest.raises(ValueError, match="positive std"):
        normalise_on(model(), [0.5, 0.5])
