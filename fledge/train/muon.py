"""Muon (Jordan 2024, "Muon: an optimizer for hidden layers in neural networks"), for many small matrices on a CPU.

The same update as `torch.optim.Muon`, its slow twin in the tests: Nesterov momentum, then the nearest orthogonal
matrix by a quintic Newton-Schulz iteration. Two things differ in how it is computed. Matrices of one shape are
orthogonalised in one batch, in float32 (bfloat16, torch's choice, runs at half the speed on CPUs
without the instructions for it). And the iteration runs on the Gram matrix: every iterate is a polynomial in
G = X X^T times X, so only squares of the short side are multiplied and the long side is touched twice.
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


def orthogonalised(
    matrices_NRC: Tensor, coefficients: tuple[float, float, float], num_iterations: int
) -> Tensor:
    """(N, R, C): for each matrix U S V^T roughly U V^T, by Newton-Schulz on its Gram matrix, in float32.

    X <- (aI + bG + cG^2) X with G = X X^T; `product` collects the polynomials R, and G follows as R G R, because R
    is symmetric and commutes with G.
    """
    a, b, c = coefficients
    is_tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = (matrices_NRC.mT if is_tall else matrices_NRC).float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    gram: Tensor = x @ x.mT
    product: Tensor | None = None
    for iteration in range(num_iterations):
        r = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        r.diagonal(dim1=1, dim2=2).add_(a)
        product = r if product is None else r @ product
        if iteration + 1 < num_iterations:
            gram = r @ gram @ r
    assert product is not None
    result: Tensor = product @ x
    return (result.mT if is_tall else result).to(matrices_NRC.dtype)
