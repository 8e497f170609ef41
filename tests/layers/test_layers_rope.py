"""Rotary positions against complex multiplication, and against what they are for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fledge.errors import ConfigError
from fledge.layers.rope import Llama3Scaling, frequencies, rotate, rotations, stretch


def heads(num_positions: int, width: int) -> Tensor:
    return torch.randn(2, num_positions, 3, width, generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize("width", [2, 6, 64])
def test_rotating_equals_multiplying_complex_numbers(width: int) -> None:
    x_BTHK = heads(9, width).double()
    positions_BT = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 1, 2, 0, 1, 2, 3, 4]])
    theta = [10000.0 ** (-2 * i / width) for i in range(width // 2)]
    found = rotate(x_BTHK, rotations(positions_BT, frequencies(width, 10000.0)))
    z = torch.complex(*x_BTHK.chunk(2, dim=-1))
    angle_BTK = positions_BT[..., None].double() * torch.tensor(theta, dtype=torch.float64)
    turned = z * torch.polar(torch.ones_like(angle_BTK), angle_BTK)[:, :, None]
    torch.testing.assert_close(found, torch.cat((turned.real, turned.imag), dim=-1), atol=1e-5, rtol=1e-5)


def test_scores_depend_on_the_distance_only() -> None:
    theta = frequencies(8, 100.0)
    q_BTHK, k_BTHK = heads(1, 8), heads(1, 8).flip(-1)

    def score(query_at: int, key_at: int) -> Tensor:
        q = rotate(q_BTHK, rotations(torch.full((2, 1), query_at), theta))
        k = rotate(k_BTHK, rotations(torch.full((2, 1), key_at), theta))
        return (q * k).sum(-1)

    torch.testing.assert_close(score(17, 5), score(112, 100), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(score(17, 5), score(17, 6), atol=1e-2)


def test_the_type_of_the_input_is_kept() -> None:
    x_BTHK = heads(4, 6).bfloat16()
    assert rotate(x_BTHK, rotations(torch.arange(4).expand(2, 4), frequencies(6, 10.0))).dtype == torch.bfloat16


def test_stretching_keeps_fast_frequencies_slows_slow_ones_and_blends_between() -> None:
    scaling = Llama3Scaling(factor=8.0, low_frequency=1.0, high_frequency=4.0, original_positions=100)
    turns = torch.tensor([50.0, 4.0, 2.5, 1.0, 0.1])  # within the original 100 positions
    theta = turns * 2 * math.pi / 100
    kept = torch.tensor([1.0, 1.0, 0.5 + 0.5 / 8, 1 / 8, 1 / 8])
    torch.testing.assert_close(stretch(theta, scaling), theta * kept)


@pytest.mark.parametrize("numbers", [(0.5, 1.0, 4.0, 8), (8.0, 4.0, 1.0, 8), (8.0, 1.0, 4.0, 0), (8.0, 0.0, 4.0, 8)])
def test_a_scaling_that_makes_no_sense_is_refused(numbers: tuple[float, float, float, int]) -> None:
    with pytest.raises(ConfigError, match="rotary scaling needs"):
        Llama3Scaling(*numbers)
