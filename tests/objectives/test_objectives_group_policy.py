"""The policy loss of groups: clip-higher, weights and shares, KL as a term of the loss."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from fledge.batches import GroupRollout
from fledge.layers.attention import SegmentContext
from fledge.models.llama import Llama, LlamaConfig
from fledge.objectives.clipped_policy import ActionSpace, action_logprobs, clipped_policy_loss
from fledge.objectives.group_policy import GroupPolicy
from fledge.train.loop import train_step
from fledge.train.optim import OptimConfig, OptimizerSet

PROMPT, RESPONSE, VOCAB, PAD = 3, 4, 20, 1
SPACE = ActionSpace(RESPONSE, banned_ids=(PAD,))


def model(seed: int = 0) -> Llama:
    llama = Llama(LlamaConfig(VOCAB, 32, 2, 2, 1, 64))
    llama.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        llama.head.weight.mul_(20)
    return llama.eval()


def rollout(num_rows: int = 8) -> GroupRollout:
    generator = torch.Generator().manual_seed(1)
    shape = (num_rows, PROMPT + RESPONSE)
    tokens = torch.randint(2, VOCAB, shape, generator=generator)
    segments, mask = torch.ones(shape, dtype=torch.int32), torch.ones(shape)
    mask[:, :PROMPT] = 0
    for row in range(num_rows):
        end = PROMPT + 1 + row % RESPONSE
        tokens[row, end:], segments[row, end:], mask[row, end:] = PAD, 0, 0
    zero = torch.zeros(shape)
    old, reference = (torch.where(mask > 0, says(model(seed), tokens, segments), 0.0).detach() for seed in (0, 1))
    old = old + 0.3 * torch.randn(shape, generator=generator) * mask
    weights = mask / mask.sum(1, keepdim=True)
    return GroupRollout(
        *(tokens, segments, mask, old, reference, zero, zero),
        torch.randn(shape, generator=generator) * mask,
        *(zero, zero[:, 0], zero, 0),
        torch.arange(num_rows) // 4,
        weights,
        torch.ones(num_rows),
    )


def says(llama, tokens, segments) -> torch.Tensor:
    return action_logprobs(llama, llama.embed(tokens, SegmentContext(segments)), tokens, segments, SPACE)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.25, 1.0, -1.25), (1.5, 1.0, -1.28), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8), (1.5, -1.0, 1.5)],
)
def test_c53_clip_higher_known_answers(ratio, advantage, expected):
    loss = clipped_policy_loss(torch.tensor(ratio).log(), torch.tensor(advantage), 0.2, clip_high=0.28)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_c53_loss_of_a_batch_has_the_upper_bound_and_the_dual_one():
    batch = rollout()
    now = says(model(), batch.tokens_BT, batch.segments_BT)
    log_ratio = torch.where(batch.action_mask_BT > 0, now - batch.old_logprobs_BT, 0.0).detach()
    sums = []
    for bounds in ({}, {"clip_high": 0.4}, {"dual_clip": 1.05}):
        term = GroupPolicy(SPACE, 0.1, **bounds).loss(model(), batch).terms["policy"]
        expected = (clipped_policy_loss(log_ratio, batch.advantages_BT, 0.1, **bounds) * batch.weights_BT).sum()
        assert term.sum.detach().item() == pytest.approx(float(expected), rel=1e-4)
        sums.append(round(float(expected), 4))
    assert len(set(sums)) == 3, "each bound matters here"


def test_c53_what_counts_as_clipped_follows_the_upper_bound():
    batch = rollout()
    shares = [
        float(GroupPolicy(SPACE, 0.05, clip_high=high).loss(model(), batch).stats["clip_fraction"][0])
        for high in (None, 0.9)
    ]
    assert shares[0] > shares[1] > 0


@pytest.mark.parametrize(("estimator", "formula"), [("k2", lambda d: d**2 / 2), ("k3", lambda d: (-d).exp() - 1 + d)])
def test_c35_kl_is_a_term_of_its_own_weighed_by_beta(estimator, formula):
    batch = rollout()
    loss = GroupPolicy(SPACE, beta=0.3, estimator=estimator).loss(model(), batch)
    delta = (says(model(), batch.tokens_BT, batch.segments_BT) - batch.reference_logprobs_BT)[batch.action_mask_BT > 0]
    expected = (formula(delta) * batch.weights_BT[batch.action_mask_BT > 0]).sum()
    assert loss.terms["kl"].weight == 0.3
    assert loss.terms["kl"].sum.detach().item() == pytest.approx(float(expected.detach()), rel=1e-4)
    assert set(GroupPolicy(SPACE).loss(model(), batch).terms) == {"policy"}


def test_sum_is_weighed_and_the_count_is_that_of_the_shares():
    batch = rollout()
    batch = replace(batch, shares_B=2 * batch.shares_B)
    term = GroupPolicy(SPACE).loss(model(), batch).terms["policy"]
    log_ratio = torch.where(
        batch.action_mask_BT > 0, says(model(), batch.tokens_BT, batch.segments_BT) - batch.old_logprobs_BT, 0.0
    )
    expected = (clipped_policy_loss(log_ratio, batch.advantages_BT, 0.2) * batch.weights_BT).sum()
    assert term.sum.detach().item() == pytest.approx(float(expected.detach()), rel=1e-4)
    assert term.count == 16


def test_c6_what_stands_outside_the_action_mask_changes_nothing():
    batch, found = rollout(), []
    outside = batch.action_mask_BT == 0
    poison = {
        name: torch.where(outside, -77.0, getattr(batch, name))
        for name in ("old_logprobs_BT", "reference_logprobs_BT", "advantages_BT")
    }
    for given in (batch, replace(batch, **poison)):
        llama = model()
        loss = GroupPolicy(SPACE, beta=0.1).loss(llama, given)
        sum(term.sum for term in loss.terms.values()).backward()
        found.append((llama.head.weight.grad, {name: float(s) / n for name, (s, n) in loss.stats.items()}))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.isfinite(found[0][0]).all()
    assert found[0][1] == found[1][1]


def test_c44_gradient_does_not_depend_on_how_the_batch_is_cut():
    batch, found, objective = rollout(), [], GroupPolicy(SPACE, beta=0.1)
    for cut in (8, 3):
        llama = model()
        parts = [batch.rows(rows) for rows in torch.arange(8).split(cut)]
        step = train_step(llama, OptimizerSet(llama, OptimConfig.adamw(1e-3)), [(objective, part) for part in parts])
        found.append([step[name] for name in ("loss", "loss/policy", "loss/kl", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_rows_of_a_rollout_keep_every_field():
    part = rollout().rows(torch.tensor([5, 2]))
    assert isinstance(part, GroupRollout)
    tensors = [getattr(part, field.name) for field in fields(part) if field.name != "policy_version"]
    assert all(len(tensor) == 2 for tensor in tensors)


@pytest.mark.parametrize(
    "wrong", [{"clip": 0.0}, {"clip_high": 0.1}, {"dual_clip": 1.0}, {"beta": -1.0}, {"estimator": "k1"}]
)
def test_options_without_meaning_are_refused(wrong):
    with pytest.raises(ValueError):
        GroupPolicy(SPACE, **wrong)
