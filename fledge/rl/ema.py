"""An exponential moving average of the weights that train: what InstructGPT evaluates and serves.

    shadow = decay * shadow + (1 - decay) * weight        after every round

Source: Ouyang et al. 2022 (2203.02155), appendix C.4 (decay 0.992). Frozen parameters have no shadow.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Shadows of `model`'s trainable parameters, float32, starting at their present values."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.shadows = {name: weight.detach().float().clone() for name, weight in _trainable(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, weight in _trainable(model):
            self.shadows[name].mul_(self.decay).add_(weight.float(), alpha=1 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the trainable parameters of `model` with their shadows."""
        for name, weight in _trainable(model):
            weight.copy_(self.shadows[name])

    def state(self) -> dict[str, Tensor]:
        return dict(self.shadows)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """ValueError if `state` is of another model."""
        if {name: t.shape for name, t in state.items()} != {n: t.shape for n, t in self.shadows.items()}:
            raise ValueError("the averaged weights belong to another model")
        for name, tensor in state.items():
            self.shadows[name].copy_(tensor)


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
