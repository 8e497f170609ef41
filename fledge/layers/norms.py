"""Normalisation with a learned gain. Sits below every family that follows Llama.

LayerNorm (Ba et al. 2016) needs no file: torch's own keeps its statistics in float32. RMSNorm: Zhang & Sennrich 2019.
Shapes: D width; any axes before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * gain` over the last axis, eq. 4; computed in float32, returned as it came."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.type_as(x)
