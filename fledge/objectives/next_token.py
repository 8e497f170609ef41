"""Predict the next token: pretraining, the code stage, SFT and PPO's pretraining mix are all this objective.

Rows of pieces become one fixed-shape batch (so that a compiled step is compiled once); the loss is the SUM of
weighted negative log-likelihoods with its count, and never NaN: a batch without a single target gives 0.
Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fledge.batches import Loss, Term, TokenBatch
from fledge.layers.attention import Context, SegmentContext
from fledge.objectives.logprobs import target_logprobs
from fledge.types import Row


class Trunk(Protocol):
    """What this objective asks of a model."""

    def embed(self, tokens_BT: Tensor, context: Context) -> Tensor: ...

    def hidden(self, x_BTD: Tensor, context: Context) -> Tensor: ...

    def unembed(self, x_BTD: Tensor) -> Tensor: ...


Sums = Callable[[Trunk, Tensor, TokenBatch], tuple[Tensor, Tensor]]


def next_token_sums(model: Trunk, x_BTD: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """(sum of weighted negative log-likelihoods in nats, weighted number of targets the model ranks first).

    `x_BTD` is what `embed` returned. Everything costly is in here, and nothing with a sparse gradient, so this is the
    region that `train/compile.py` compiles.
    """
    context = SegmentContext(batch.segments_BT)
    logits_BTV = model.unembed(model.hidden(x_BTD, context)).float()
    logprobs_BT = target_logprobs(logits_BTV, batch.targets_BT)
    # `where` before the product: an impossible target (-inf) under a mask of 0 must not become NaN.
    nll_BT = torch.where(batch.mask_BT > 0, -logprobs_BT, 0.0) * batch.mask_BT
    with torch.no_grad():
        target_logits_BT = logits_BTV.gather(-1, batch.targets_BT[..., None])[..., 0]
        is_first_BT = target_logits_BT >= logits_BTV.amax(dim=-1)
        first_sum = (is_first_BT * batch.mask_BT).sum()
    return nll_BT.sum(), first_sum


class NextToken:
    """`row_length` positions a row, padded with `pad_id`. `sums` may be a compiled `next_token_sums`."""

    def __init__(self, row_length: int, pad_id: int, sums: Sums = next_token_sums) -> None:
        self.row_length = row_length
        self.pad_id = pad_id
        self._sums = sums

    def collate(self, examples: Sequence[Row]) -> TokenBatch:
        """One row an example; a piece of n+1 tokens takes n positions. ValueError if a row does not fit."""
        shape = (len(examples), self.row_length)
        tokens_BT = torch.full(shape, self.pad_id, dtype=torch.int64)
        targets_BT = torch.full(shape, self.pad_id, dtype=torch.int64)
        mask_BT = torch.zeros(shape, dtype=torch.float32)
        segments_BT = torch.zeros(shape, dtype=torch.int32)
        for row_index, row in enumerate(examples):
            start = 0
            for number, piece in enumerate(row, start=1):
                end = start + len(piece.ids) - 1
                if end > self.row_length:
                    raise ValueError(f"row {row_index} needs {end} positions, the batch has {self.row_length} a row")
                ids = torch.from_numpy(piece.ids)
                tokens_BT[row_index, start:end] = ids[:-1]
                targets_BT[row_index, start:end] = ids[1:]
                mask_BT[row_index, start:end] = torch.from_numpy(piece.loss_mask)[1:]
                segments_BT[row_index, start:end] = number
                start = end
        return TokenBatch(tokens_BT, targets_BT, mask_BT, segments_BT)

    def loss(self, model: Trunk, batch: TokenBatch) -> Loss:
        """Term "next_token" in nats a target; stat "accuracy": share of targets that the model ranks first."""
        x_BTD = model.embed(batch.tokens_BT, SegmentContext(batch.segments_BT))
        nll_sum, first_sum = self._sums(model, x_BTD, batch)
        count = batch.counts["next_token"]
        return Loss({"next_token": Term(nll_sum, count)}, {"accuracy": (first_sum, count)})
