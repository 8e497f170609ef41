"""Muon (Jordan 2024, "Muon: an optimizer for hidden layers in neural networks"), for many small matrices on a CPU.

The same update as `torch.optim.Muon`, its slow twin in the tests: Nesterov momentum, then the nearest orthogonal
matrix by a quintic Newton-Schulz iteration. Two things differ in how it is computed. Matrices of one shape are
orthogonalised in one batch and in float32: torch's loop in bfloat16 takes 5 to 8 times as long on the CPUs we
measured. And oblong matrices are iterated on their Gram matrix, so that the long side is touched twice in all.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-7  # guards the norm of an all-zero gradient, as in torch


class Muon(torch.optim.Muon):
    """torch's optimizer with another `step`. State per parameter: `momentum_buffer`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        momentum = group["momentum"]
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            gradient: Any = parameter.grad
            state["momentum_buffer"].lerp_(gradient, 1 - momentum)
            updates.append(gradient.lerp(state["momentum_buffer"], momentum))  # Nesterov
        directions = orthogonalised(torch.stack(updates), group["ns_coefficients"], group["ns_steps"])
        # Jordan's scale: a tall matrix maps to more outputs, each of which should move as much as in a square one.
        num_rows, num_columns = parameters[0].shape
        rate = group["lr"] * max(1.0, num_rows / num_columns) ** 0.5
        weights: list[Tensor] = [parameter.data for parameter in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(directions.unbind()), alpha=-rate)


def orthogonalised(matrices_NRC: Tensor, coefficients: tuple[float, float, float], num_iterations: int) -> Tensor:
    """(N, R, C): for each matrix U S V^T roughly U V^T, by Newton-Schulz, in float32.

    X <- R X with R = aI + bG + cG^2 and G = X X^T. A step on X costs 2 L/S + 1 products of the short side S, one on G
    alone 4 (every R is symmetric and a polynomial in the first G, so all commute: `product` collects them and G
    follows as R G R), which pays from L/S = 1.5.
    """
    is_tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = (matrices_NRC.mT if is_tall else matrices_NRC).float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    iterate = _on_gram if 2 * x.shape[2] >= 3 * x.shape[1] else _on_matrix
    result = iterate(x, coefficients, num_iterations)
    return (result.mT if is_tall else result).to(matrices_NRC.dtype)


def _on_matrix(x: Tensor, coefficients: tuple[float, float, float], num_iterations: int) -> Tensor:
    a, b, c = coefficients
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _on_gram(x: Tensor, coefficients: tuple[float, float, float], num_iterations: int) -> Tensor:
    a, b, c = coefficients
    gram: Tensor = x @ x.mT
    product: Tensor | None = None
    for iteration in range(num_iterations):
        r = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        r.diagonal(dim1=1, dim2=2).add_(a)
        product = r if product is None else r @ product
        if iteration + 1 < num_iterations:
            gram = r @ gram @ r
    return x if product is None else product @ x
