"""Optimizers by role: a model says what its parameters are (`roles()`), a config says how each role learns.

Matrices go to Muon (Jordan 2024) or AdamW (Loshchilov & Hutter 2019), tables to a row-sparse Adam that touches only
the rows a batch looked up. State leaves and returns as {name: tensor} by PARAMETER NAME, so that a checkpoint
survives another order of parameters and a resumed run is equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fledge.config import check_range
from fledge.errors import CheckpointError
from fledge.layers.lora import LoraLinear
from fledge.train.muon import Muon
from fledge.train.rows import RowAdam


@dataclass(frozen=True)
class Rule:
    """How one role learns. `betas` belongs to the two Adams, `momentum` to Muon; `lr` is the peak of the schedule.

    `decay` is decoupled weight decay per unit of learning rate; row-sparse tables have none.
    """

    method: Literal["adamw", "muon", "rows"]
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.0
    momentum: float = 0.95

    def __post_init__(self) -> None:
        if self.method == "rows" and self.decay:
            raise ValueError("row-sparse tables cannot decay: rows that a batch does not touch stay as they are")
        check_range(self, "lr eps decay", 0)
        if not all(0 <= share < 1 for share in (*self.betas, self.momentum)):
            raise ValueError(f"betas {self.betas} and momentum {self.momentum}: expected 0 or more, below 1")


@dataclass(frozen=True)
class OptimConfig:
    """One rule a role (docs/architecture.md, "Parameter roles")."""

    matrix: Rule
    embedding: Rule
    table: Rule
    head: Rule
    gain: Rule

    @classmethod
    def adamw(
        cls, lr: float, *, decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> OptimConfig:
        """AdamW for all, decay on matrices only (GPT-3, appendix B; gains and embeddings are exempt)."""
        plain = Rule("adamw", lr, betas, eps)
        return cls(
            matrix=Rule("adamw", lr, betas, eps, decay),
            embedding=plain,
            table=Rule("rows", lr, betas, eps),
            head=plain,
            gain=plain,
        )

    @classmethod
    def by_role(cls, scale: float = 1.0) -> OptimConfig:
        """Muon and Adam with a rate for every role, from our pretraining trials; all rates times `scale`."""
        betas, eps = (0.8, 0.95), 1e-10
        return cls(
            matrix=Rule("muon", 0.02 * scale),
            embedding=Rule("adamw", 0.1 * scale, betas, eps),
            table=Rule("rows", 0.05 * scale, betas, eps),
            head=Rule("adamw", 0.01 * scale, betas, eps),
            gain=Rule("adamw", 0.02 * scale, betas, eps),
        )


class OptimizerSet:
    """The optimizers of one model. `roles` defaults to `model.roles()`; frozen parameters are left out.

    ValueError if a trainable parameter has no role, or if there is nothing to train.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, roles: Mapping[str, str] | None = None) -> None:
        if roles is None:
            roles = _roles_of(model)
        self.config = config
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._named:
            raise ValueError(f"every parameter of this {type(model).__name__} is frozen: there is nothing to train")
        self._roles = dict(roles)
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        known = [field.name for field in fields(config)]
        for name in self._named:
            if self._roles.get(name) not in known:
                raise ValueError(f"parameter {name} has role {self._roles.get(name)!r}; known are {', '.join(known)}")
        for role in known:
            parameters = [p for name, p in self._named.items() if self._roles[name] == role]
            if parameters:
                self._optimizers[role] = _build(getattr(config, role), parameters)

    def set_scale(self, scale: float) -> None:
        """Every learning rate becomes `scale` times its peak."""
        for role, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = getattr(self.config, role).lr * scale

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that train, in the order of the model's names."""
        return list(self._named.values())

    def zero_grad(self) -> None:
        for parameter in self._named.values():
            parameter.grad = None

    def clip(self, max_norm: float | None) -> float:
        """The norm of all gradients together; scales them down to `max_norm` if it is more (None: never)."""
        values = [_gradient_values(p) for p in self._named.values() if p.grad is not None]
        if not values:
            return 0.0
        norms = torch.stack(torch._foreach_norm(values))
        norm = float(norms.double().norm())
        if max_norm is not None and norm > max_norm:
            torch._foreach_mul_(values, max_norm / norm)
        return norm

    def step(self) -> None:
        for optimizer in self._optimizers.values():
            optimizer.step()

    def reset_role(self, role: str) -> None:
        """Forget the moments and step counts of one role, as if its parameters were new."""
        for name, parameter in self._named.items():
            if self._roles[name] == role:
                self._optimizers[role].state.pop(parameter, None)

    def tensors(self) -> dict[str, Tensor]:
        """All state as {"<parameter>:<slot>": tensor}; step counts included. The tensors are not copies."""
        return {
            f"{name}:{slot}": value
            for name, parameter in self._named.items()
            for slot, value in self._state_of(name, parameter).items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all state by what `tensors()` gave; CheckpointError, nothing changed, for what does not fit."""
        slots = {}
        for key, value in tensors.items():
            name, _, slot = key.rpartition(":")
            parameter = self._named.get(name)
            if parameter is None:
                raise CheckpointError(f"optimizer state '{key}' belongs to no trainable parameter of this model")
            if value.ndim and value.shape != parameter.shape:
                shapes = f"{tuple(value.shape)}, expected {tuple(parameter.shape)}"
                raise CheckpointError(f"optimizer state '{key}' has shape {shapes}")
            slots[name, slot] = value
        for optimizer in self._optimizers.values():
            optimizer.state.clear()
        for (name, slot), value in slots.items():
            parameter = self._named[name]
            # Step counts stay where the optimizer looks for them: fused AdamW wants them beside the parameter.
            self._optimizers[self._roles[name]].state[parameter][slot] = value.to(parameter.device, copy=True)

    def _state_of(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._optimizers[self._roles[name]].state.get(parameter, {})
        return state


def _roles_of(model: nn.Module) -> Mapping[str, str]:
    """What the model says, and that the pairs of an adapter are matrices: it knows nothing of them."""
    roles: Callable[[], Mapping[str, str]] = model.roles  # type: ignore[assignment]
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    return {**roles(), **{f"{name}.{side}": "matrix" for name in adapted for side in "ab"}}


def _build(rule: Rule, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    if rule.method == "muon":
        return Muon(parameters, lr=rule.lr, momentum=rule.momentum, weight_decay=rule.decay)
    if rule.method == "rows":
        return RowAdam(parameters, lr=rule.lr, betas=rule.betas, eps=rule.eps)
    return torch.optim.AdamW(
        parameters, lr=rule.lr, betas=rule.betas, eps=rule.eps, weight_decay=rule.decay, fused=True
    )


def _gradient_values(parameter: nn.Parameter) -> Tensor:
    """The gradient, or the values of a row-sparse one with every row made unique (the norm needs that)."""
    gradient: Any = parameter.grad
    if not gradient.is_sparse:
        return gradient  # type: ignore[no-any-return]
    if not gradient.is_coalesced():
        parameter.grad = gradient = gradient.coalesce()
    return gradient._values()  # type: ignore[no-any-return]
