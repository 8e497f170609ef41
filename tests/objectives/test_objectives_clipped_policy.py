"""PPO's policy loss: known answers, masking, the one distribution that actions come from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fledge.batches import Rollout
from fledge.layers.attention import SegmentContext
from fledge.models.llama import Llama, LlamaConfig
from fledge.objectives.clipped_policy import ActionSpace, ClippedPolicy, action_logprobs, clipped_policy_loss
from fledge.train.loop import train_step
from fledge.train.optim import OptimConfig, OptimizerSet

PROMPT, RESPONSE, VOCAB, PAD = 3, 4, 20, 1
SPACE = ActionSpace(RESPONSE, banned_ids=(PAD,))


def model() -> Llama:
    llama = Llama(LlamaConfig(VOCAB, 32, 2, 2, 1, 64))
    llama.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        llama.head.weight.mul_(20)
    return llama.eval()


def rollout(num_rows: int = 8) -> Rollout:
    """Random episodes of uneven lengths with made-up advantages and old log-probabilities near the model's."""
    generator = torch.Generator().manual_seed(1)
    shape = (num_rows, PROMPT + RESPONSE)
    tokens = torch.randint(2, VOCAB, shape, generator=generator)
    segments, mask = torch.ones(shape, dtype=torch.int32), torch.ones(shape)
    mask[:, :PROMPT] = 0
    for row in range(num_rows):
        end = PROMPT + 1 + row % RESPONSE
        tokens[row, end:], segments[row, end:], mask[row, end:] = PAD, 0, 0
    noise = 0.3 * torch.randn(shape, generator=generator)
    old = torch.where(mask > 0, logprobs(model(), tokens, segments, SPACE) + noise, 0.0)
    advantages = torch.randn(shape, generator=generator) * mask
    zero = torch.zeros(shape)
    return Rollout(tokens, segments, mask, old, zero, zero, zero, advantages, zero, zero[:, 0], zero, policy_version=0)


def logprobs(llama, tokens, segments, space) -> torch.Tensor:
    with torch.no_grad():
        return action_logprobs(llama, llama.embed(tokens, SegmentContext(segments)), tokens, segments, space)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.5, 1.0, -1.2), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8)],
)
def test_c39_clipped_surrogate_known_answers(ratio, advantage, expected):
    loss = clipped_policy_loss(torch.tensor(ratio).log(), torch.tensor(advantage), 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_c39_dual_clip_bounds_the_loss_of_a_negative_advantage_at_three_times_itself():
    log_ratio, advantage = torch.tensor([5.0, 5.0, 1.5]).log(), torch.tensor([-1.0, 1.0, -1.0])
    assert clipped_policy_loss(log_ratio, advantage, 0.2, 3.0).tolist() == pytest.approx([3.0, -1.2, 1.5])
    assert clipped_policy_loss(log_ratio, advantage, 0.2).tolist() == pytest.approx([5.0, -1.2, 1.5])


def test_c39_gradient_stops_past_the_bound_that_holds_for_the_sign_of_the_advantage():
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    clipped_policy_loss(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2).sum().backward()
    assert (log_ratio.grad != 0).tolist() == [False, True, True, False]


def test_loss_with_a_huge_ratio_is_finite():
    log_ratio = torch.tensor([500.0, -500.0]).requires_grad_()
    loss = clipped_policy_loss(log_ratio, torch.tensor([-1.0, 1.0]), 0.2).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(log_ratio.grad).all()


def test_c4_log_probability_of_a_response_equals_a_loop_over_its_tokens():
    llama, batch = model(), rollout()
    found = logprobs(llama, batch.tokens_BT, batch.segments_BT, SPACE)
    for row in range(8):
        for t in range(PROMPT, PROMPT + int(batch.action_mask_BT[row].sum())):
            with torch.no_grad():
                logits = llama.next_logprobs(batch.tokens_BT[row : row + 1, :t])[0, -1]
            logits[PAD] = float("-inf")
            alone = logits.log_softmax(-1)[batch.tokens_BT[row, t]]
            assert found[row, t].item() == pytest.approx(alone.item(), abs=1e-5)
    assert (found[:, :PROMPT] == 0).all()


def test_c21_temperature_divides_the_logits():
    llama, batch = model(), rollout()
    warm = logprobs(llama, batch.tokens_BT, batch.segments_BT, replace(SPACE, temperature=0.7))
    x = llama.embed(batch.tokens_BT, SegmentContext(batch.segments_BT))
    with torch.no_grad():
        logits = llama.unembed(llama.hidden(x, SegmentContext(batch.segments_BT)))[:, PROMPT - 1 : -1] / 0.7
    logits[..., PAD] = float("-inf")
    expected = logits.log_softmax(-1).gather(-1, batch.tokens_BT[:, PROMPT:, None])[..., 0]
    assert torch.allclose(warm[:, PROMPT:], expected, atol=1e-5)


def test_c22_banned_token_has_no_probability_and_the_others_share_its_mass():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    allowed = SPACE.logits(logits).softmax(-1)
    assert (allowed[:, PAD] == 0).all()
    rest = logits.softmax(-1)
    rest[:, PAD] = 0
    assert torch.allclose(allowed, rest / rest.sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(ActionSpace(RESPONSE).logits(logits), logits)


def test_c6_what_stands_outside_the_action_mask_changes_neither_loss_nor_gradient_nor_figures():
    batch, results = rollout(), []
    outside = batch.action_mask_BT == 0
    poisoned = replace(
        batch,
        old_logprobs_BT=torch.where(outside, -77.0, batch.old_logprobs_BT),
        advantages_BT=torch.where(outside, 55.0, batch.advantages_BT),
    )
    for given in (batch, poisoned):
        llama = model()
        loss = ClippedPolicy(SPACE).loss(llama, given)
        loss.terms["policy"].sum.backward()
        figures = {name: float(total) / count for name, (total, count) in loss.stats.items()}
        results.append((loss.terms["policy"].sum.detach(), llama.head.weight.grad, figures))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.isfinite(results[0][1]).all(), "a banned token beside the mask must not become NaN"
    assert results[0][2] == results[1][2]


def test_figures_are_means_over_actions_and_extremes_of_the_ratio():
    llama, batch = model(), rollout()
    loss = ClippedPolicy(SPACE).loss(llama, batch)
    stats = {n: float(s) / c for n, (s, c) in loss.stats.items()} | {
        name: float(extreme) for name, extreme in (*loss.lows.items(), *loss.highs.items())
    }
    is_action = batch.action_mask_BT > 0
    now = logprobs(llama, batch.tokens_BT, batch.segments_BT, SPACE)
    log_ratio, advantage = (now - batch.old_logprobs_BT)[is_action], batch.advantages_BT[is_action]
    ratio = log_ratio.exp()
    clipped = torch.where(advantage > 0, ratio > 1.2, ratio < 0.8)
    expected = {
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clip_fraction": clipped.float().mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "ratio_gap": (ratio - 1).abs().max(),
    }
    assert stats == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-5)
    assert 0 < stats["clip_fraction"] < 1


def test_c36_ratio_is_one_where_old_is_the_model_itself():
    llama, batch = model(), rollout()
    old = torch.where(batch.action_mask_BT > 0, logprobs(llama, batch.tokens_BT, batch.segments_BT, SPACE), 0.0)
    loss = ClippedPolicy(SPACE).loss(llama, replace(batch, old_logprobs_BT=old))
    assert float(loss.highs["ratio_gap"]) <= 1e-5
    assert float(loss.stats["clip_fraction"][0]) == 0


def test_c48_extremes_of_the_ratio_do_not_depend_on_the_cut_and_a_part_without_actions_has_none():
    batch, found = rollout(), []
    batch.action_mask_BT[5:7] = 0  # two episodes whose reward could not be had
    for sizes in ([8], [5, 2, 1]):
        llama = model()
        parts = [batch.rows(rows) for rows in torch.arange(8).split(sizes)]
        told = train_step(
            llama, OptimizerSet(llama, OptimConfig.adamw(0.0)), [(ClippedPolicy(SPACE), p) for p in parts]
        )
        found.append([told[name] for name in ("ratio_min", "ratio_max", "ratio_gap")])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0][0] < 1 < found[0][1]
    alone = ClippedPolicy(SPACE).loss(model(), batch.rows(torch.tensor([5, 6])))
    assert not alone.lows
    assert not alone.highs


def test_c44_gradient_does_not_depend_on_the_cut_into_micro_batches():
    batch, results = rollout(), []
    for sizes in ([8], [3, 5], [1] * 8):
        llama = model()
        optimizers = OptimizerSet(llama, OptimConfig.adamw(0.0, decay=0.0))
        parts = [batch.rows(rows) for rows in torch.arange(8).split(sizes)]
        metrics = train_step(llama, optimizers, [(ClippedPolicy(SPACE), part) for part in parts])
        results.append((metrics["loss"], [p.grad.clone() for p in llama.parameters()]))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-6)
        for gradient, expected in zip(gradients, results[0][1], strict=True):
            assert torch.allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"clip": 1.0}, {"dual_clip": 1.0}])
def test_options_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match="clip must"):
        ClippedPolicy(SPACE, **wrong)


def test_action_space_without_temperature_or_length_is_refused():
    for wrong in ({"temperature": 0.0}, {"response_length": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            replace(SPACE, **wrong)


def test_collate_passes_one_rollout_through():
    batch = rollout()
    assert ClippedPolicy(SPACE).collate([batch]) is batch
