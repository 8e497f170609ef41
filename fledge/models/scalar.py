"""A trunk of any causal family with one number a token: reward models, value models, gold judges.

The language-model head of the trunk stays in place, unused and frozen, so that a trunk is copied whole and any
family works. What the head says is normalised by `mean` and `std`, buffers that are stored with the weights, so that
every reader of a reward model sees the same scale.

Source: Ouyang et al. 2022 (2203.02155), section 3.5 (reward model, value model); the head's initialisation is that
of Stiennon et al. 2020 (2009.01325), appendix B.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fledge.config import from_json, to_json
from fledge.errors import ConfigError
from fledge.layers.attention import Context
from fledge.registry import family, load_family


@dataclass(frozen=True)
class ScalarConfig:
    """`trunk` is the trunk's own config as JSON values; `trunk_family` names its row in the registry."""

    trunk_family: str = "pocket"
    trunk: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if family(self.trunk_family).kind != "causal":
            raise ConfigError(f"trunk_family must be a causal family, got '{self.trunk_family}'")


class ScalarModel(nn.Module):
    """`scores(tokens_BT, context) -> (B, T)`: one float32 number for every token and what precedes it."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ScalarConfig) -> None:
        super().__init__()
        config_class, model_class = load_family(config.trunk_family)
        self._adopt(config, model_class(from_json(config_class, config.trunk, path="trunk")))

    @classmethod
    def from_trunk(
        cls,
        trunk_family: str,
        trunk: nn.Module,
        *,
        generator: torch.Generator,
        freeze_roles: Sequence[str] = ("table",),
    ) -> ScalarModel:
        """A scalar model on a copy of `trunk`, its head drawn anew from `generator`.

        Parameters whose role is in `freeze_roles` are not copied but shared with `trunk`, and frozen in both: tables
        that no later stage trains cost their memory once.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        frozen = freeze(trunk, freeze_roles)
        copied = copy.deepcopy(trunk, memo={id(parameter): parameter for parameter in frozen})
        model._adopt(ScalarConfig(trunk_family, to_json(trunk.config)), copied)
        model.reset_head(generator)
        return model

    def _adopt(self, config: ScalarConfig, trunk: nn.Module) -> None:
        self.config = config
        self.trunk = trunk
        self.head = nn.Linear(int(trunk.config.width), 1)  # type: ignore[union-attr, arg-type]
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.train()
        for name in language_head(trunk):  # no path from it to a score
            trunk.get_parameter(name).requires_grad_(False)

    def train(self, mode: bool = True) -> ScalarModel:
        """A judge must say the same of the same text: the trunk stays in evaluation mode, without dropout."""
        super().train(mode)
        self.trunk.eval()
        return self

    @property
    def vocab_size(self) -> int:
        return int(self.trunk.vocab_size)  # type: ignore[arg-type]

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw trunk and head anew."""
        self.trunk.init_weights(generator)  # type: ignore[operator]
        self.reset_head(generator)

    def reset_head(self, generator: torch.Generator) -> None:
        """Weight ~ N(0, 1/sqrt(width + 1)), bias 0, so that first scores have a spread of about one."""
        width = self.head.in_features
        with torch.no_grad():
            drawn = torch.empty(self.head.weight.shape).normal_(0.0, (width + 1) ** -0.5, generator=generator)
            self.head.weight.copy_(drawn)
            self.head.bias.zero_()

    def embed(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """What the trunk's `embed` returns."""
        x: Tensor = self.trunk.embed(tokens_BT, context)  # type: ignore[operator]
        return x

    def hidden(self, x: Tensor, context: Context) -> Tensor:
        """Normalised scores (B, T), float32, from what `embed` returned."""
        raw_BT = self.head(self.trunk.hidden(x, context)).squeeze(-1).float()  # type: ignore[operator]
        normalised_BT: Tensor = (raw_BT - self.mean) / self.std
        return normalised_BT

    forward = hidden

    def scores(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """Normalised scores (B, T), float32."""
        return self.hidden(self.embed(tokens_BT, context), context)

    def normalise(self, mean: float, std: float) -> None:
        """Shift and scale what the model says NOW so that scores of mean `mean` and spread `std` become 0 and 1.

        Calling it again with (0, 1) changes nothing. Raises ValueError unless `std` is positive and both are finite.
        """
        if not (0 < std < float("inf") and abs(mean) < float("inf")):
            raise ValueError(f"normalisation needs a finite mean and a positive std, got mean {mean} and std {std}")
        self.mean.add_(mean * self.std)
        self.std.mul_(std)

    def roles(self) -> dict[str, str]:
        """Roles of the parameters that can move a score: the trunk's without its language-model head."""
        trunk_roles: dict[str, str] = self.trunk.roles()  # type: ignore[operator]
        unused = language_head(self.trunk)
        roles = {f"trunk.{name}": role for name, role in trunk_roles.items() if name not in unused}
        return {**roles, "head.weight": "head", "head.bias": "gain"}


def language_head(trunk: nn.Module) -> set[str]:
    """Parameters of the module that holds the head's weight, its bias included; none if the head is tied."""
    roles: dict[str, str] = trunk.roles()  # type: ignore[operator]
    owners = {name.rpartition(".")[0] for name, role in roles.items() if role == "head"}
    return {name for name in roles if name.rpartition(".")[0] in owners}


def freeze(model: nn.Module, roles: Sequence[str]) -> list[nn.Parameter]:
    """Stop training the parameters of `model` that have one of `roles`; returns them."""
    role_of: dict[str, str] = model.roles()  # type: ignore[operator]
    frozen = [parameter for name, parameter in model.named_parameters() if role_of.get(name) in roles]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def thaw(model: nn.Module, freeze_roles: Sequence[str]) -> None:
    """Train every parameter of `model` that has a role, but for those of `freeze_roles`; no other is of any use."""
    role_of: dict[str, str] = model.roles()  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(role_of.get(name) not in (None, *freeze_roles))


ModelT = TypeVar("ModelT", bound=nn.Module)


def twin(model: ModelT) -> ModelT:
    """A copy of `model` that shares its frozen parameters and owns all others, and all buffers."""
    frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in frozen})
