"""KL estimators: known answers, and which gradient each one has as a loss."""

from __future__ import annotations

import pytest
import torch

from fledge.objectives.kl import k1, k2, k3

DELTA = torch.tensor([0.1, -0.2, 0.0])


def test_c35_known_answers_of_the_three_estimators():
    assert k1(DELTA).tolist() == pytest.approx([0.1, -0.2, 0.0])
    assert k2(DELTA).tolist() == pytest.approx([0.005, 0.02, 0.0])
    assert k3(DELTA).tolist() == pytest.approx([0.004837, 0.021403, 0.0], abs=1e-6)


def test_c35_k3_is_finite_for_a_token_the_reference_thinks_impossible():
    assert torch.isfinite(k3(torch.tensor([1e4, -1e4]))).all()


def exact(estimator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(expected value, gradient of the estimator used as a loss, gradient of the KL) over all of 7 tokens."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reference = torch.randn(7, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    divergence = (logprobs.exp() * (logprobs - reference)).sum()
    expected = (logprobs.exp().detach() * estimator(logprobs - reference)).sum()
    (as_loss,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (truth,) = torch.autograd.grad(divergence, logits)
    return expected.detach() - divergence.detach(), as_loss, truth


def test_c35_k1_and_k3_are_unbiased_and_k2_is_not():
    assert exact(k1)[0].abs() < 1e-6
    assert exact(k3)[0].abs() < 1e-6
    assert exact(k2)[0].abs() > 1e-3


def test_c35_as_a_loss_only_k2_has_the_gradient_of_the_divergence():
    _, as_loss, truth = exact(k2)
    assert torch.allclose(as_loss, truth, atol=1e-6)
    assert torch.allclose(exact(k1)[1], torch.zeros(7), atol=1e-6)
    assert not torch.allclose(exact(k3)[1], truth, atol=1e-3)
