"""The networks of PPO and where they come from: policy and reference from SFT, value function from the reward model.

Source: Ouyang et al. 2022 (2203.02155), section 3.5: the value function starts from the reward model, head included;
the reference is the frozen SFT model. Frozen parameters (pocket's n-gram tables) are held once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fledge.models.scalar import ScalarModel, freeze, thaw, twin


@dataclass(frozen=True)
class Actors:
    """`policy` and `value` train; `reference` is frozen. All run in evaluation mode, without dropout."""

    policy: Any  # a causal family of models/, an nn.Module
    reference: Any
    value: ScalarModel

    def __post_init__(self) -> None:
        self.reference.requires_grad_(False)
        self.quiet()

    def quiet(self) -> None:
        """Evaluation mode for all: dropout would put noise between the old and the new log-probability."""
        for model in (self.policy, self.reference, self.value):
            model.eval()

    @classmethod
    def start(
        cls, policy: nn.Module, reward_model: ScalarModel, *, freeze_roles: tuple[str, ...] = ("table",)
    ) -> Actors:
        """The SFT model as policy, a frozen copy of it as reference, a copy of the reward model as value function.

        The reward model is left frozen: it is only asked from here on; one that came frozen gives a value function
        that trains all the same. Parameters of `freeze_roles` do not train, and are shared wherever they are equal.
        """
        if not any(parameter.requires_grad for parameter in reward_model.parameters()):
            thaw(reward_model, freeze_roles)
        freeze(policy, freeze_roles)
        share_equal(policy, reward_model.trunk, freeze_roles)
        freeze(reward_model.trunk, freeze_roles)
        value = twin(reward_model)
        reward_model.requires_grad_(False)
        return cls(policy, twin(policy).requires_grad_(False), value)


@dataclass(frozen=True)
class PolicyPair:
    """What methods without a value function need: `policy` trains, `reference` is frozen; both without dropout."""

    policy: Any  # a causal family of models/, an nn.Module
    reference: Any

    def __post_init__(self) -> None:
        self.reference.requires_grad_(False)
        self.quiet()

    def quiet(self) -> None:
        """Evaluation mode for both: dropout would put noise between the old and the new log-probability."""
        self.policy.eval()
        self.reference.eval()

    @classmethod
    def start(cls, policy: nn.Module, *, freeze_roles: tuple[str, ...] = ("table",)) -> PolicyPair:
        """A model as policy and a frozen copy of it as reference; parameters that do not train are held once."""
        freeze(policy, freeze_roles)
        return cls(policy, twin(policy).requires_grad_(False))


def share_equal(source: nn.Module, target: nn.Module, roles: tuple[str, ...]) -> None:
    """Let `target` use `source`'s parameters of these roles in place of its own, wherever both are equal."""
    role_of: dict[str, str] = source.roles()  # type: ignore[operator]
    theirs = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        if role_of.get(name) in roles and name in theirs and torch.equal(parameter, theirs[name]):
            owner, _, leaf = name.rpartition(".")
            setattr(target.get_submodule(owner), leaf, parameter)
