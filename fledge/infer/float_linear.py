"""Linear layers of a float32 model on a CPU, while the engine runs it: few rows at a time go through our own kernel.

A decoding step multiplies one to some dozens of rows with every weight, which libraries of matrix products are not made
for (kernels/linear_float.cpp). Layer 5, beside quantized.py. The model is not changed: its layers are of another class
for as long as a step takes, with the parameters that they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.infer import kernels
from fledge.infer.causal import CausalModel

MOST_ROWS = 48  # beyond, MKL is as fast or faster (docs/log.md)


class FewRowsLinear(nn.Linear):
    """`nn.Linear` for inference. Up to `MOST_ROWS` rows, a row's result does not depend on the rows beside it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and x.numel() <= MOST_ROWS * self.in_features:
            return kernels.linear_float(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def float_linears(model: CausalModel) -> tuple[nn.Linear, ...]:
    """The layers that `few_rows` makes faster; none where there is no kernel."""
    found = tuple(module for module in model.modules() if type(module) is nn.Linear and _suits(module.weight))
    return found if found and kernels.load().is_compiled else ()


@contextmanager
def few_rows(linears: Sequence[nn.Linear]) -> Iterator[None]:
    """These layers are `FewRowsLinear` meanwhile."""
    _become(linears, FewRowsLinear)
    try:
        yield
    finally:
        _become(linears, nn.Linear)


def _become(linears: Sequence[nn.Linear], kind: type[nn.Linear]) -> None:
    for linear in linears:
        object.__setattr__(linear, "__class__", kind)  # nn.Module's own way takes ten times as long, every step


def _suits(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
