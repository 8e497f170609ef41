"""Binary cross-entropy over what is known: worked by hand, blind to what is unknown, and the same however it is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fledge.errors import DataError
from fledge.objectives.multi_label import LabelledIds, MultiLabel


class Fixed:
    """Says these logits, row by row in the order of `tokens[:, 0]`."""

    def __init__(self, logits_BK: Tensor) -> None:
        self.logits_BK = logits_BK
        self.lengths: list[int] = []

    def logits(self, tokens_BT: Tensor, lengths_B: Tensor, context: object) -> Tensor:
        self.lengths = lengths_B.tolist()
        return self.logits_BK[tokens_BT[:, 0]]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_loss_is_that_of_the_formula() -> None:
    objective = MultiLabel(8, 99, [3.0, 1.0])
    batch = objective.collate([LabelledIds((0, 5), (True, False)), LabelledIds((1,), (None, True))])
    model = Fixed(torch.tensor([[0.5, -1.0], [7.0, 2.0]]))
    loss = objective.loss(model, batch)
    expected = 3 * softplus(-0.5) + softplus(-1.0) + softplus(-2.0)
    assert float(loss.terms["labels"].sum) == pytest.approx(expected, rel=1e-6)
    assert loss.terms["labels"].count == batch.counts["labels"] == 5.0
    assert model.lengths == [2, 1]
    right, known = loss.stats["accuracy"]
    assert (int(right), known) == (3, 3.0)


def test_an_unknown_label_moves_nothing() -> None:
    objective = MultiLabel(8, 99, [2.0, 2.0])
    batch = objective.collate([LabelledIds((0,), (None, True))])
    losses = []
    for unknown in (-50.0, 50.0):
        logits = torch.tensor([[unknown, 0.3]], requires_grad=True)
        term = objective.loss(Fixed(logits), batch).terms["labels"].sum
        term.backward()
        assert logits.grad is not None
        assert logits.grad[0, 0] == 0
        losses.append(float(term.detach()))
    assert losses[0] == losses[1]


def test_sums_over_parts_add_up_to_the_whole() -> None:
    objective = MultiLabel(8, 99, [1.5, 4.0])
    examples = [LabelledIds((i,), (i % 2 == 0, None if i % 3 else True)) for i in range(5)]
    model = Fixed(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))
    whole = objective.loss(model, objective.collate(examples)).terms["labels"]
    parts = [objective.loss(model, objective.collate(part)).terms["labels"] for part in (examples[:2], examples[2:])]
    assert float(whole.sum) == pytest.approx(sum(float(part.sum) for part in parts), rel=1e-6)
    assert whole.count == sum(part.count for part in parts)


@pytest.mark.parametrize("ids", [(), tuple(range(9))])
def test_a_text_that_is_empty_or_too_long_is_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(DataError):
        MultiLabel(8, 99, [1.0]).collate([LabelledIds(ids, (True,))])
