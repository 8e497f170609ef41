"""The K-wise ranking loss: known answers, one forward a completion, prompts that weigh the same, honest ties."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from fledge.batches import RankingBatch
from fledge.config import to_json
from fledge.errors import DataError
from fledge.models.llama import LlamaConfig
from fledge.models.scalar import ScalarConfig, ScalarModel
from fledge.objectives.ranking import (
    KWiseRanking,
    PairLabel,
    RankedIds,
    kwise_loss_sum,
    labelled_loss_sum,
    last_scores,
    pair_labels,
    strict_pairs,
)

OBJECTIVE = KWiseRanking(row_length=12, pad_id=1)


def model() -> ScalarModel:
    scalar = ScalarModel(ScalarConfig("llama", to_json(LlamaConfig(20, 32, 2, 2, 1, 64))))
    scalar.init_weights(torch.Generator().manual_seed(0))
    return scalar


def loss_of(scores, ranks, prompts=None) -> float:
    prompts = [0] * len(scores) if prompts is None else prompts
    return float(kwise_loss_sum(torch.tensor(scores), torch.tensor(prompts), torch.tensor(ranks)))


def by_pairs(scores, ranks) -> float:
    """The slow twin: one pair after another, for one prompt."""
    pairs = [sorted(pair, key=lambda i: ranks[i]) for pair in combinations(range(len(scores)), 2)]
    strict = [(i, j) for i, j in pairs if ranks[i] < ranks[j]]
    return sum(math.log1p(math.exp(scores[j] - scores[i])) for i, j in strict) / len(strict)


def ranking(*lengths: int, ranks: tuple[int, ...] | None = None, seed: int = 0) -> RankedIds:
    generator = torch.Generator().manual_seed(seed)
    drawn = [tuple(torch.randint(2, 20, (n,), generator=generator).tolist()) for n in (3, *lengths)]
    return RankedIds(drawn[0], tuple(drawn[1:]), ranks or tuple(range(1, len(lengths) + 1)))


def test_c14_loss_at_equal_scores_is_log_two_and_a_constant_changes_nothing():
    assert loss_of([0.0, 0.0], [1, 2]) == pytest.approx(0.693147, abs=1e-6)
    assert loss_of([0.3, -1.0, 2.0], [2, 1, 3]) == pytest.approx(loss_of([7.3, 6.0, 9.0], [2, 1, 3]), abs=1e-5)


def test_c15_known_answer_of_four_ordered_scores():
    assert loss_of([3.0, 2.0, 1.0, 0.0], [1, 2, 3, 4]) == pytest.approx(0.2070, abs=1e-4)


def test_c15_two_answers_are_the_pairwise_loss():
    assert loss_of([1.0, 0.2], [1, 2]) == pytest.approx(-math.log(1 / (1 + math.exp(-0.8))), abs=1e-6)
    assert loss_of([1.0, 0.2], [2, 1]) == pytest.approx(-math.log(1 / (1 + math.exp(0.8))), abs=1e-6)


def test_c15_nine_answers_are_thirty_six_pairs():
    assert int(strict_pairs(torch.zeros(9), torch.arange(9)).sum()) == 36


def test_c15_every_completion_passes_through_the_model_once():
    scalar, seen = model(), []
    scalar.trunk.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    OBJECTIVE.loss(scalar, OBJECTIVE.collate([ranking(*[4] * 9)]))
    assert sum(seen) == 9


def test_c15_ties_are_left_out_and_the_normaliser_shrinks():
    scores, ranks = [0.5, 0.1, -0.4, 0.9], [1, 2, 2, 4]
    assert int(strict_pairs(torch.zeros(4), torch.tensor(ranks)).sum()) == 5
    assert loss_of(scores, ranks) == pytest.approx(by_pairs(scores, ranks), abs=1e-6)


def test_c15_every_prompt_weighs_the_same_however_many_pairs_it_has():
    small, large = ([0.3, 0.9], [1, 2]), ([0.1, 0.7, -0.2, 0.4, 1.0], [3, 1, 5, 2, 4])
    together = loss_of(small[0] + large[0], small[1] + large[1], [0, 0, 1, 1, 1, 1, 1])
    assert together == pytest.approx(by_pairs(*small) + by_pairs(*large), abs=1e-5)
    batch = OBJECTIVE.collate([ranking(2, 3), ranking(4, 4, 4, 4, 4)])
    assert batch.counts == {"ranking": 2.0}
    assert OBJECTIVE.loss(model(), batch).terms["ranking"].count == 2.0


def test_loss_equals_its_slow_twin_on_random_rankings():
    generator = torch.Generator().manual_seed(3)
    for size in range(2, 10):
        scores = torch.randn(size, generator=generator).tolist()
        ranks = torch.randint(1, 4, (size,), generator=generator).tolist()
        if len(set(ranks)) > 1:
            assert loss_of(scores, ranks) == pytest.approx(by_pairs(scores, ranks), abs=1e-5)


def test_scores_are_read_at_the_last_real_token_of_every_row():
    scalar, batch = model(), OBJECTIVE.collate([ranking(2, 5, 9)])
    with torch.no_grad():
        scores = last_scores(scalar, batch)
        for n, length in enumerate([5, 8, 12]):
            alone = RankingBatch(
                batch.tokens_NT[n : n + 1, :length],
                torch.ones(1, length, dtype=torch.int32),
                torch.tensor([length - 1]),
                torch.zeros(1, dtype=torch.int64),
                torch.ones(1, dtype=torch.int64),
                1,
            )
            assert last_scores(scalar, alone)[0] == pytest.approx(float(scores[n]), abs=1e-5)


def test_rows_that_fill_a_batch_to_a_fixed_shape_change_neither_loss_nor_gradient_nor_figures():
    examples = [ranking(2, 5, 9), ranking(3, 3, ranks=(2, 1), seed=1)]
    results = []
    for num_rows in (None, 11):
        scalar = model()
        objective = KWiseRanking(12, 1, num_rows)
        loss = objective.loss(scalar, objective.collate(examples))
        loss.terms["ranking"].sum.backward()
        figures = [float(total) / count for total, count in loss.stats.values()]
        results.append((float(loss.terms["ranking"].sum.detach()), scalar.head.weight.grad.clone(), figures))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)
    assert results[0][2] == pytest.approx(results[1][2], abs=1e-6)


def test_accuracy_and_margin_are_means_over_strict_pairs():
    scalar = model()
    batch = OBJECTIVE.collate([ranking(2, 5, 9, 4, ranks=(1, 2, 2, 4))])
    loss = OBJECTIVE.loss(scalar, batch)
    with torch.no_grad():
        s = last_scores(scalar, batch).tolist()
    gaps = [s[i] - s[j] for i, j in ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))]
    accuracy, margin = loss.stats["accuracy"], loss.stats["margin"]
    assert accuracy[1] == margin[1] == 5
    assert float(accuracy[0]) == sum(gap > 0 for gap in gaps)
    assert float(margin[0]) == pytest.approx(sum(gaps), abs=1e-5)


@pytest.mark.parametrize(
    ("completions", "ranks", "complaint"),
    [
        (((5,), (6,)), (1, 1), "all ties"),
        (((5,), (6,)), (1,), "one rank a completion"),
        (((5,), ()), (1, 2), "no tokens"),
    ],
)
def test_ranking_that_cannot_be_learned_from_is_refused(completions, ranks, complaint):
    with pytest.raises(DataError, match=complaint):
        RankedIds((4,), completions, ranks)


def test_batch_that_does_not_fit_its_fixed_shape_is_refused():
    with pytest.raises(DataError, match="rows hold 12"):
        OBJECTIVE.collate([ranking(10, 2)])
    with pytest.raises(DataError, match="expected 1 to 3"):
        KWiseRanking(12, 1, num_rows=3).collate([ranking(2, 2, 2, 2)])
    with pytest.raises(DataError, match="0 answers"):
        OBJECTIVE.collate([])


def labelled(labels, lengths=(2, 3, 4), ranks=(1, 1, 1)) -> RankedIds:
    plain = ranking(*lengths)
    return RankedIds(plain.prompt, plain.completions, ranks, tuple(labels))


def test_labels_that_say_what_the_ranks_say_give_the_same_loss_and_figures():
    plain = ranking(2, 3, 4, ranks=(2, 1, 2))
    with_labels = RankedIds(plain.prompt, plain.completions, plain.ranks, (PairLabel(1, 0), PairLabel(2, 1, 0.0)))
    other = ranking(5, 2, seed=1)
    found = []
    for examples in ([plain, other], [with_labels, other]):
        loss = OBJECTIVE.loss(model(), OBJECTIVE.collate(examples))
        stats = {name: float(total.detach()) / count for name, (total, count) in loss.stats.items()}
        found.append([loss.terms["ranking"].sum.detach().item(), *stats.values()])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_soft_label_and_margin_known_answers():
    weights, margins = pair_labels([labelled([PairLabel(0, 1, 0.8, 0.5)], (1, 1), (1, 1))], 2)
    scores = torch.tensor([2.0, 0.5])
    expected = 0.8 * math.log1p(math.exp(-1.0)) + 0.2 * math.log1p(math.exp(1.0))
    assert labelled_loss_sum(scores, weights, margins).item() == pytest.approx(expected, abs=1e-6)
    turned = pair_labels([labelled([PairLabel(1, 0, 0.2, -0.5)], (1, 1), (1, 1))], 2)
    assert labelled_loss_sum(scores, *turned).item() == pytest.approx(expected, abs=1e-6)


def test_tie_that_is_learned_is_least_where_both_scores_are_equal():
    weights, margins = pair_labels([labelled([PairLabel(0, 1, 0.5)], (1, 1), (1, 1))], 2)
    scores = torch.tensor([0.3, 0.3], requires_grad=True)
    loss = labelled_loss_sum(scores, weights, margins)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert scores.grad.abs().max() < 1e-7


def test_every_prompt_weighs_the_same_however_many_labels_it_has():
    weights, _ = pair_labels([labelled([PairLabel(0, 1), PairLabel(1, 2, 0.6)]), ranking(2, 2, seed=1)], 6)
    assert weights[:3, :3].sum() == pytest.approx(1)
    assert weights[3:5, 3:5].sum() == pytest.approx(1)
    assert weights.sum() == pytest.approx(2)


@pytest.mark.parametrize("label", [PairLabel(0, 0), PairLabel(0, 3), PairLabel(-1, 0), PairLabel(0, 1, 1.5)])
def test_label_without_meaning_is_refused(label):
    with pytest.raises(DataError):
        labelled([label])
