"""PPO's value loss: known answer, masking, and the value that belongs to an action."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fledge.batches import Rollout
from fledge.config import to_json
from fledge.layers.attention import SegmentContext
from fledge.models.llama import LlamaConfig
from fledge.models.scalar import ScalarConfig, ScalarModel
from fledge.objectives.clipped_value import ClippedValue, action_values, clipped_value_loss


def model() -> ScalarModel:
    scalar = ScalarModel(ScalarConfig("llama", to_json(LlamaConfig(20, 32, 2, 2, 1, 64))))
    scalar.init_weights(torch.Generator().manual_seed(0))
    return scalar


def rollout() -> Rollout:
    generator = torch.Generator().manual_seed(1)
    shape = (4, 7)
    tokens = torch.randint(2, 20, shape, generator=generator)
    segments, mask = torch.ones(shape, dtype=torch.int32), torch.zeros(shape)
    mask[:, 3:6] = 1
    old, returns = torch.randn(2, *shape, generator=generator)
    zero = torch.zeros(shape)
    return Rollout(tokens, segments, mask, zero, zero, old, zero, zero, returns, zero[:, 0], zero, policy_version=0)


def test_c40_known_answer():
    loss = clipped_value_loss(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.5), 0.2)
    assert loss.item() == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("value", "old", "target", "expected"),
    [
        (1.0, 0.0, 2.0, 0.5 * 1.8**2),  # moved towards the target too fast: the clipped error counts
        (1.0, 0.0, -1.0, 0.5 * 2.0**2),  # moved away: the full error counts
        (0.1, 0.0, 1.0, 0.5 * 0.9**2),  # within the range both are the same
    ],
)
def test_c40_larger_of_both_errors_counts(value, old, target, expected):
    loss = clipped_value_loss(torch.tensor(value), torch.tensor(old), torch.tensor(target), 0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_without_clipping_the_loss_is_half_the_squared_error():
    loss = clipped_value_loss(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(3.0), None)
    assert loss.item() == pytest.approx(2.0)


def test_value_of_an_action_is_what_the_model_says_before_it():
    scalar, batch = model(), rollout()
    with torch.no_grad():
        values = action_values(scalar, batch.tokens_BT, batch.segments_BT)
        scores = scalar.scores(batch.tokens_BT, SegmentContext(batch.segments_BT))
        changed = batch.tokens_BT.clone()
        changed[:, 4] = 3
        later = action_values(scalar, changed, batch.segments_BT)
    assert torch.equal(values[:, 1:], scores[:, :-1])
    assert torch.allclose(values[:, 4], later[:, 4]), "an action must not be seen by its own baseline"
    assert not torch.allclose(values[:, 5], later[:, 5])


def test_c6_what_stands_outside_the_action_mask_changes_neither_loss_nor_gradient():
    batch, results = rollout(), []
    outside = batch.action_mask_BT == 0
    poisoned = replace(batch, returns_BT=torch.where(outside, 99.0, batch.returns_BT))
    for given in (batch, poisoned):
        scalar = model()
        loss = ClippedValue().loss(scalar, given)
        loss.terms["value"].sum.backward()
        figures = {name: float(total) / count for name, (total, count) in loss.stats.items()}
        results.append((loss.terms["value"].sum.detach(), scalar.head.weight.grad, figures))
        assert loss.terms["value"].count == given.counts["value"] == 12
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_figures_are_means_over_actions():
    scalar, batch = model(), rollout()
    stats = {name: float(total) / count for name, (total, count) in ClippedValue(0.5).loss(scalar, batch).stats.items()}
    is_action = batch.action_mask_BT > 0
    with torch.no_grad():
        values = action_values(scalar, batch.tokens_BT, batch.segments_BT)[is_action]
    expected = {
        "value": values.mean(),
        "value_error": (values - batch.returns_BT[is_action]).square().mean(),
        "value_clip_fraction": ((values - batch.old_values_BT[is_action]).abs() > 0.5).float().mean(),
    }
    assert stats == pytest.approx({name: float(figure) for name, figure in expected.items()}, abs=1e-5)


def test_clip_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="None switches it off"):
        ClippedValue(0.0)


def test_collate_passes_one_rollout_through():
    batch = rollout()
    assert ClippedValue().collate([batch]) is batch
