"""RMSNorm against its formula."""

from __future__ import annotations

import torch

from fledge.layers.norms import RMSNorm, rms_norm


def test_rms_norm_equals_equation_4() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, generator=generator)
    norm = RMSNorm(7, 1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(7, generator=generator))
    expected = (
        torch.stack([row / (row.square().mean() + 1e-3) ** 0.5 for row in x.view(-1, 7)]).view_as(x) * norm.weight
    )
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_keeps_the_type_and_takes_its_statistics_in_float32() -> None:
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # the sum of squares overflows float16 many times over
    y = RMSNorm(4096, 1e-6).to(torch.float16)(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), torch.ones(1, 4096), atol=1e-3, rtol=0.0)


def test_training_gives_the_values_of_inference_to_the_bit_and_the_gradient_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        inferred = rms_norm(x, 1e-3)
    assert torch.equal(rms_norm(x, 1e-3), inferred)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, 1e-3), x)
    (trained,) = torch.autograd.grad(rms_norm(x, 1e-3).sin().sum(), x)
    (plain,) = torch.autograd.grad(torch.nn.functional.rms_norm(x, (8,), eps=1e-3).sin().sum(), x)
    torch.testing.assert_close(trained, plain)


def test_the_module_gives_the_same_bits_with_and_without_gradients() -> None:
    norm, x = RMSNorm(7, 1e-3), torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(2))
        inferred = norm(x)
    assert torch.equal(norm(x), inferred)
