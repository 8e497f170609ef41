"""GAE and whitening: known answers, the slow twin, and tokens that are no action."""

from __future__ import annotations

import pytest
import torch

from fledge.rl.advantage import gae, gae_by_definition, whiten


def test_c28_known_answer():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5)
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=0.95)
    assert advantages[0].tolist() == pytest.approx([0.45125, 0.475, 0.5], abs=1e-6)
    assert returns[0].tolist() == pytest.approx([0.95125, 0.975, 1.0], abs=1e-6)


def test_c28_with_lambda_one_the_advantage_is_the_return_minus_the_value():
    values = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    rewards = torch.zeros(2, 5)
    rewards[:, -1] = 3.0
    advantages, _ = gae(rewards, values, torch.ones(2, 5), gamma=1.0, lam=1.0)
    assert torch.allclose(advantages, 3.0 - values, atol=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_c28_c29_batch_equals_the_definition_on_the_actions_alone_wherever_they_stand(gamma, lam):
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 20, 15, generator=generator)
    mask = (torch.rand(20, 15, generator=generator) < 0.6).float()
    rewards = rewards * mask
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row in range(20):
        chosen = mask[row] > 0
        expected, expected_returns = gae_by_definition(
            rewards[row, chosen].tolist(), values[row, chosen].tolist(), gamma=gamma, lam=lam
        )
        assert advantages[row, chosen].tolist() == pytest.approx(expected, abs=1e-5)
        assert returns[row, chosen].tolist() == pytest.approx(expected_returns, abs=1e-5)


def test_c29_value_is_carried_across_an_interior_observation_not_zeroed():
    mask = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 9.0, 9.0, 0.5]])
    advantages, _ = gae(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), values, mask, gamma=1.0, lam=0.95)
    assert advantages[0].tolist() == pytest.approx([0.475, 0, 0, 0.5], abs=1e-6)


def test_c32_padding_has_no_advantage_and_no_return():
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    advantages, returns = gae(torch.ones(1, 4) * mask, torch.full((1, 4), 7.0), mask, gamma=1.0, lam=0.95)
    outside = mask == 0
    assert (advantages[outside] == 0).all()
    assert (returns[outside] == 0).all()
    assert (whiten(torch.full((1, 4), 7.0), mask, shift_mean=True)[outside] == 0).all()


def test_c30_known_answer_uses_the_population_variance():
    values = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    expected = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]
    whitened = whiten(values, torch.ones(3, 3), shift_mean=False)
    assert torch.allclose(whitened, torch.tensor(expected), atol=1e-4)


def test_c30_c31_whitening_sees_the_mask_only():
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(4, 6, generator=generator) * 3 + 5
    mask = (torch.rand(4, 6, generator=generator) < 0.5).float()
    chosen = mask > 0
    shifted = whiten(values, mask, shift_mean=True)[chosen]
    assert shifted.mean().item() == pytest.approx(0, abs=1e-6)
    assert shifted.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    kept = whiten(values, mask, shift_mean=False)[chosen]
    assert kept.mean().item() == pytest.approx(values[chosen].mean().item(), abs=1e-5)
    poisoned = torch.where(chosen, values, 1e4)
    assert torch.equal(whiten(poisoned, mask, shift_mean=True), whiten(values, mask, shift_mean=True))


def test_c31_a_single_token_or_none_stays_finite():
    for count in (0, 1):
        mask = torch.zeros(1, 3)
        mask[0, :count] = 1
        for shift_mean in (True, False):
            assert torch.isfinite(whiten(torch.tensor([[4.0, 5.0, 6.0]]), mask, shift_mean=shift_mean)).all()
    one = whiten(torch.tensor([[4.0]]), torch.ones(1, 1), shift_mean=False)
    assert one.item() == pytest.approx(4.0)
