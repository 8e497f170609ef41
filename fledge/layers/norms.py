"""Root-mean-square normalisation, with and without a learned gain. Sits below every family that follows Llama.

LayerNorm (Ba et al. 2016) needs no file: torch's own keeps its statistics in float32. RMSNorm: Zhang & Sennrich 2019.
Shapes: D width; any axes before it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, eq. 4 without its gain."""
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _RMSNorm.apply(x, eps)
        return y
    return F.rms_norm(x, x.shape[-1:], eps=eps)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * gain` over the last axis, eq. 4; computed in float32, returned as it came."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return (rms_norm(x.float(), self.eps) * self.weight.float()).type_as(x)
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.type_as(x)


class _RMSNorm(torch.autograd.Function):
    """The values of torch's own, to the bit, and a third of its time forward and backward on a CPU (docs/log.md).

    With y = s x and s = 1 / sqrt(mean(x^2) + eps): dx = s (dy - y mean(y dy)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        y = F.rms_norm(x, x.shape[-1:], eps=eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        ctx.save_for_backward(y, torch.rsqrt(norm.square() / x.shape[-1] + eps))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        mean = (dy * y).mean(dim=-1, keepdim=True)
        return torch.addcmul(dy, y, mean, value=-1).mul_(scale), None
