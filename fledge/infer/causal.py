"""What generation asks of a model, shared by the oracle (naive.py) and the engine (runner.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fledge.layers.attention import Context


class CausalModel(Protocol):
    """An `nn.Module` of a causal family (models/)."""

    vocab_size: int
    config: Any  # has `max_positions: int | None`
    training: bool

    def embed(self, tokens_BT: Tensor, context: Context) -> Tensor: ...

    def hidden(self, x_BTD: Tensor, context: Context) -> Tensor: ...

    def unembed(self, x_BTD: Tensor) -> Tensor: ...

    def next_logprobs(self, tokens_BT: Tensor) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Any]: ...


@contextmanager
def evaluating(model: CausalModel) -> Iterator[None]:
    """No gradients, and every module in evaluation mode (no dropout); each goes back to the mode it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def device_of(model: CausalModel) -> torch.device:
    return next(chain(model.parameters(), model.buffers())).device
