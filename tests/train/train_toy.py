"""Toys for the tests of training: a batch with counts, an objective of sums, a model with every role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fledge.batches import Loss, Term
from fledge.models.pocket import Pocket, PocketConfig
from fledge.objectives.next_token import NextToken
from fledge.train.loop import Pairs, TrainState
from fledge.train.optim import OptimConfig, OptimizerSet
from fledge.train.schedule import Schedule
from fledge.types import Piece


@dataclass(frozen=True)
class ToyBatch:
    x_N: Tensor
    y_N: Tensor
    mask_N: Tensor

    @property
    def counts(self) -> Mapping[str, float]:
        return {"square": float(self.mask_N.sum()), "rows": float(len(self.mask_N))}

    def to(self, device: torch.device) -> ToyBatch:
        return self


class ToyObjective:
    """Two terms with different counts, as BERT or PPO have."""

    def loss(self, model: nn.Module, batch: ToyBatch) -> Loss:
        error_N = (model(batch.x_N) - batch.y_N) ** 2 * batch.mask_N
        terms = {
            "square": Term(error_N.sum(), batch.counts["square"]),
            "rows": Term(model(batch.x_N).sum(), batch.counts["rows"], weight=0.1),
        }
        return Loss(terms, {"masked": (batch.mask_N.sum(), batch.counts["rows"])})


class ToyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self, x_N: Tensor) -> Tensor:
        return self.w[0] * x_N + self.w[1]

    def roles(self) -> dict[str, str]:
        return {"w": "gain"}


def plain_config(lr: float = 0.01) -> OptimConfig:
    return OptimConfig.adamw(lr, decay=0.0)


def pocket_state(num_steps: int = 12, *, seed: int = 0, dropout: float = 0.0) -> TrainState:
    model = Pocket(PocketConfig(40, width=16, num_layers=2, num_heads=2, table_rows=64))
    model.init_weights(torch.Generator().manual_seed(seed))
    if dropout:
        model.blocks[0].up = nn.Sequential(nn.Dropout(dropout), model.blocks[0].up)  # type: ignore[union-attr]
    optimizers = OptimizerSet(model, OptimConfig.by_role(0.3))
    return TrainState(model, optimizers, Schedule("linear", num_steps, 3, 0.6), seed=seed)


def text_rows(seed: int, num_rows: int) -> list[tuple[Piece, ...]]:
    """Rows of two pieces with uneven masks; the next token follows from the last."""
    rng = np.random.default_rng(seed)

    def piece(length: int) -> Piece:
        ids = (np.arange(length) * 7 + rng.integers(0, 40)) % 40
        mask = rng.integers(0, 2, length)
        return Piece(ids.astype(np.int32), mask.astype(np.float32))

    return [(piece(int(rng.integers(2, 9))), piece(int(rng.integers(2, 9)))) for _ in range(num_rows)]


OBJECTIVE = NextToken(16, 1)


def text_batches(step: int) -> Pairs:
    rows = text_rows(step, 4)
    return [(OBJECTIVE, OBJECTIVE.collate(rows[:1])), (OBJECTIVE, OBJECTIVE.collate(rows[1:]))]


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def losses_of(records: Sequence[Mapping[str, float]]) -> list[float]:
    return [record["loss"] for record in records]
