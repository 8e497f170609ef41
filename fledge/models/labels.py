"""A trunk of any causal family with K numbers a text: classifiers that give a text several labels at once.

A text is the mean of its hidden states scaled to length 1, which is what the engine's `embed` gives (infer/scoring.py),
and the labels are linear in it. So the trunk is served as an ordinary model, and the head needs no torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.layers.attention import Context
from fledge.models.scalar import freeze, language_head


class Labels(nn.Module):
    """`logits(tokens_BT, lengths_B, context) -> (B, K)`, float32."""

    def __init__(
        self,
        trunk: nn.Module,
        num_labels: int,
        *,
        generator: torch.Generator,
        freeze_roles: Sequence[str] = ("table",),
    ) -> None:
        """On a copy of `trunk`, which shares what is frozen. The head starts at 0: every label even odds."""
        super().__init__()
        frozen = freeze(trunk, freeze_roles)
        self.trunk = copy.deepcopy(trunk, memo={id(parameter): parameter for parameter in frozen})
        width = int(trunk.config.width)  # type: ignore[union-attr, arg-type]
        self.head = nn.Linear(width, num_labels)
        with torch.no_grad():
            self.head.weight.normal_(0.0, 0.01 * width**-0.5, generator=generator)
            self.head.bias.zero_()
        for name in language_head(self.trunk):  # no path from it to a label
            self.trunk.get_parameter(name).requires_grad_(False)

    @property
    def config(self) -> Any:
        """The trunk's."""
        return self.trunk.config

    def train(self, mode: bool = True) -> Labels:
        """A judge must say the same of the same text: the trunk stays in evaluation mode, without dropout."""
        super().train(mode)
        self.trunk.eval()
        return self

    def logits(self, tokens_BT: Tensor, lengths_B: Tensor, context: Context) -> Tensor:
        """(B, K) float32. `lengths_B` counts the real tokens of each row, which stand first."""
        x_BTD = self.trunk.hidden(self.trunk.embed(tokens_BT, context), context).float()  # type: ignore[operator]
        is_real_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) < lengths_B[:, None]
        mean_BD = (x_BTD * is_real_BT[..., None]).sum(dim=1) / lengths_B[:, None]
        logits_BK: Tensor = self.head(F.normalize(mean_BD, dim=-1) * self.scale)
        return logits_BK

    forward = logits

    @property
    def scale(self) -> float:
        """Between a vector of length 1 and one whose components are about 1, which is what a head learns from best."""
        return float(self.head.in_features**0.5)

    def exported(self) -> tuple[Tensor, Tensor]:
        """(weight_KD, bias_K) such that the labels' logits are weight @ embedding + bias."""
        return (self.head.weight.detach() * self.scale).cpu(), self.head.bias.detach().cpu()

    def roles(self) -> dict[str, str]:
        """Roles of the parameters that can move a label."""
        trunk_roles: dict[str, str] = self.trunk.roles()  # type: ignore[operator]
        unused = language_head(self.trunk)
        roles = {f"trunk.{name}": role for name, role in trunk_roles.items() if name not in unused}
        return {**roles, "head.weight": "head", "head.bias": "gain"}
