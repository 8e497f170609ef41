"""Rotary positions: queries and keys are turned by an angle that grows with their position.

Source: Su et al. 2021 (RoFormer), section 3.2.2, with channel i paired with channel i + K/2, the layout of every
Llama checkpoint in Hugging Face form (the paper pairs neighbours; the two differ by a fixed permutation of channels).
Stretching the slow frequencies to contexts longer than those trained on: Llama 3 (Grattafiori et al. 2024, section
3.4.1; the formula is in the code Meta released with the 3.1 models).
Shapes: B rows, T positions, H heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.errors import ConfigError

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequencies whose wavelength exceeds `original_positions / low_frequency` are slowed by `factor`; those below
    `original_positions / high_frequency` stay; those between are blended."""

    factor: float
    low_frequency: float
    high_frequency: float
    original_positions: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_frequency < self.high_frequency and self.original_positions > 0):
            raise ConfigError(
                "rotary scaling needs factor >= 1, 0 < low_frequency < high_frequency and original_positions > 0, "
                f"got {self}"
            )


def frequencies(head_width: int, base: float, device: torch.device | None = None) -> Tensor:
    """theta_i = base^(-2i/K) for i = 0 .. K/2-1, radians per position, float32."""
    pairs = torch.arange(0, head_width, 2, dtype=torch.float32, device=device)
    return 1.0 / base ** (pairs / head_width)


def stretch(theta: Tensor, scaling: Llama3Scaling) -> Tensor:
    """`theta` with its slow end divided by `scaling.factor`, smoothly between the two wavelength bounds."""
    turns = scaling.original_positions * theta / (2 * math.pi)  # full turns within the original context
    low, high = scaling.low_frequency, scaling.high_frequency
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * theta + (1.0 - kept) * theta / scaling.factor


def rotations(positions_BT: Tensor, theta: Tensor) -> Rotation:
    """(cos, sin) of position x theta, each (B, T, 1, K/2), float32."""
    angle_BTK = positions_BT[..., None].float() * theta
    return angle_BTK.cos()[:, :, None], angle_BTK.sin()[:, :, None]


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Turn channels i and i + K/2 of every head as one pair by the angle of their position; the type of `x` is kept."""
    cos, sin = rotation
    a, b = x_BTHK.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x_BTHK)
