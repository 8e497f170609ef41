"""Next-token prediction: collation, sums with counts, packing (C4, C8, C9), and never NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.layers.attention import SegmentContext
from fledge.models.pocket import Pocket, PocketConfig
from fledge.objectives.logprobs import entropy, target_logprobs
from fledge.objectives.next_token import NextToken, next_token_sums
from fledge.types import Piece

VOCAB = 23
PAD = 1


def piece(ids: Sequence[int], mask: Sequence[float] | None = None) -> Piece:
    weights = np.ones(len(ids)) if mask is None else np.asarray(mask)
    return Piece(np.asarray(ids, dtype=np.int32), weights.astype(np.float32))


def lively_model() -> Pocket:
    """A pocket model in which every path carries something: nothing that starts at zero stays there."""
    model = Pocket(PocketConfig(VOCAB, width=16, num_layers=2, num_heads=2, table_rows=64))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def grads(model: Pocket) -> dict[str, torch.Tensor]:
    return {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}


def test_collate_shifts_each_piece_by_one_and_never_across_pieces() -> None:
    batch = NextToken(6, PAD).collate([(piece([5, 6, 7]), piece([8, 9])), (piece([4, 3]),)])
    assert batch.tokens_BT.tolist() == [[5, 6, 8, PAD, PAD, PAD], [4, PAD, PAD, PAD, PAD, PAD]]
    assert batch.targets_BT[0, :3].tolist() == [6, 7, 9]
    assert batch.mask_BT.tolist() == [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.segments_BT.tolist() == [[1, 1, 2, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.counts == {"next_token": 4.0}


def test_collate_uses_the_mask_of_the_predicted_token_not_of_the_one_that_predicts() -> None:
    batch = NextToken(3, PAD).collate([(piece([5, 6, 7, 8], [1, 0, 0.5, 1]),)])
    assert batch.mask_BT.tolist() == [[0, 0.5, 1]]


def test_a_row_that_does_not_fit_is_refused_with_both_lengths() -> None:
    with pytest.raises(ValueError, match="row 1 needs 5 positions, the batch has 4"):
        NextToken(4, PAD).collate([(piece([1, 2]),), (piece([1, 2, 3]), piece([1, 2, 3, 4]))])


def test_the_loss_is_the_weighted_sum_of_what_next_logprobs_says() -> None:
    model, ids, mask = lively_model(), [5, 6, 7, 8, 2], [1.0, 0.0, 0.25, 1.0, 2.0]
    objective = NextToken(8, PAD)
    loss = objective.loss(model, objective.collate([(piece(ids, mask),)]))
    logprobs_TV = model.next_logprobs(torch.tensor([ids]))[0].detach()
    by_hand = -sum(mask[i] * float(logprobs_TV[i - 1, ids[i]]) for i in range(1, 5))
    assert loss.terms["next_token"].sum.item() == pytest.approx(by_hand, rel=1e-5)
    assert loss.terms["next_token"].count == 3.25
    hits = sum(mask[i] * (int(logprobs_TV[i - 1].argmax()) == ids[i]) for i in range(1, 5))
    assert float(loss.stats["accuracy"][0]) == pytest.approx(hits)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(2, 7), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_c8_packed_documents_have_the_loss_and_gradients_of_unpacked_ones(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = [piece(rng.integers(2, VOCAB, n), rng.integers(0, 2, n)) for n in lengths]
    model = lively_model()
    packed = NextToken(sum(lengths), PAD)
    loss = packed.loss(model, packed.collate([tuple(pieces)])).terms["next_token"]
    loss.sum.backward()
    packed_grads = grads(model)
    model.zero_grad()
    apart = NextToken(8, PAD)
    loss_apart = apart.loss(model, apart.collate([(p,) for p in pieces])).terms["next_token"]
    loss_apart.sum.backward()
    assert loss.count == loss_apart.count
    torch.testing.assert_close(loss.sum, loss_apart.sum, rtol=1e-5, atol=1e-5)
    for name, gradient in grads(model).items():
        torch.testing.assert_close(packed_grads[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("rows", [[()], [(), ()], [(piece([5, 6, 7], [0, 0, 0]),)], []])
def test_rows_and_batches_without_a_target_give_zero_loss_and_zero_gradient(rows: list[Any]) -> None:
    model, objective = lively_model(), NextToken(4, PAD)
    loss = objective.loss(model, objective.collate(rows))
    loss.terms["next_token"].sum.backward()
    assert loss.terms["next_token"].sum.item() == 0.0
    assert loss.terms["next_token"].count == 0.0
    assert all(float(gradient.abs().sum()) == 0.0 for gradient in grads(model).values())


def test_an_impossible_target_under_a_zero_mask_does_not_make_nan() -> None:
    class Banning(torch.nn.Module):
        def embed(self, tokens_BT: torch.Tensor, context: Any) -> torch.Tensor:
            return torch.zeros(*tokens_BT.shape, 4)

        def hidden(self, x_BTD: torch.Tensor, context: Any) -> torch.Tensor:
            return x_BTD

        def unembed(self, x_BTD: torch.Tensor) -> torch.Tensor:
            logits_BTV = x_BTD.sum(-1, keepdim=True).expand(*x_BTD.shape[:2], VOCAB).clone()
            logits_BTV[..., PAD] = float("-inf")
            return logits_BTV

    objective = NextToken(4, PAD)
    loss = objective.loss(Banning(), objective.collate([(piece([5, 6]),)]))
    assert loss.terms["next_token"].sum.item() == pytest.approx(math.log(VOCAB - 1))


def test_sums_can_be_replaced_and_see_what_embed_returned() -> None:
    seen = []

    def spy(model: Any, x_BTD: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(x_BTD.shape)
        return next_token_sums(model, x_BTD, batch)

    objective = NextToken(4, PAD, spy)
    objective.loss(lively_model(), objective.collate([(piece([5, 6]),)]))
    assert seen == [(1, 4, 3 * 16)]


def test_target_logprobs_equal_log_softmax_even_for_huge_logits_and_half_precision() -> None:
    logits = torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(0)) * 1e4
    targets = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(target_logprobs(logits, targets), expected)
    half = target_logprobs((logits / 1e4).bfloat16(), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, target_logprobs((logits / 1e4).bfloat16().double().float(), targets))


def test_entropy_of_known_distributions() -> None:
    uniform = torch.zeros(1, 1, 8)
    two_of_three = torch.tensor([[[0.0, 0.0, float("-inf")]]])
    certain = torch.tensor([[[0.0, float("-inf"), float("-inf")]]])
    assert float(entropy(uniform)) == pytest.approx(math.log(8))
    assert float(entropy(two_of_three)) == pytest.approx(math.log(2))
    assert float(entropy(certain)) == 0.0


def test_the_context_of_a_loss_keeps_documents_apart() -> None:
    """The first document's tokens must not move the second document's loss."""
    model, objective = lively_model(), NextToken(8, PAD)

    def second(first_ids: list[int]) -> torch.Tensor:
        batch = objective.collate([(piece(first_ids), piece([9, 10, 11]))])
        context = SegmentContext(batch.segments_BT)
        hidden = model.hidden(model.embed(batch.tokens_BT, context), context)
        return target_logprobs(model.unembed(hidden), batch.targets_BT)[0, 3:5]

    torch.testing.assert_close(second([2, 3, 4, 5]), second([6, 7, 8, 12]), rtol=0, atol=1e-6)
