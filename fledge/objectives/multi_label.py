"""Several yes-or-no labels a text, of which only some are known: binary cross-entropy over the known ones.

    -(w y log sigmoid(z) + (1 - y) log sigmoid(-z))

`w` is the label's own weight of a positive, so that a category with few examples is learnt at all (King & Zeng 2001,
"Logistic Regression in Rare Events Data", section 4.2: weighting). Suffixes: B texts, T positions, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.batches import LabelBatch, Loss, Term
from fledge.errors import DataError
from fledge.layers.attention import Context, SegmentContext


class Labelling(Protocol):
    """models/labels.py."""

    def logits(self, tokens_BT: Tensor, lengths_B: Tensor, context: Context) -> Tensor: ...


@dataclass(frozen=True)
class LabelledIds:
    """A text as tokens; `labels[k]` is None where label k was not judged."""

    ids: tuple[int, ...]
    labels: tuple[bool | None, ...]


class MultiLabel:
    """`positive_weights[k]` is w of label k."""

    def __init__(self, row_length: int, pad_id: int, positive_weights: Sequence[float]) -> None:
        self.row_length, self.pad_id = row_length, pad_id
        self.positive_weights_K = torch.tensor(positive_weights, dtype=torch.float32)

    def collate(self, examples: Sequence[LabelledIds]) -> LabelBatch:
        """Rows as long as the longest text. DataError for one that is empty or longer than `row_length`."""
        longest = max(len(example.ids) for example in examples)
        if not 0 < min(len(example.ids) for example in examples) <= longest <= self.row_length:
            raise DataError(f"a text has {longest} tokens, or none; expected 1 to {self.row_length}")
        tokens_BT = torch.full((len(examples), longest), self.pad_id, dtype=torch.int64)
        segments_BT = torch.zeros((len(examples), longest), dtype=torch.int32)
        targets_BK = torch.zeros(len(examples), len(self.positive_weights_K))
        known_BK = torch.zeros_like(targets_BK)
        for b, example in enumerate(examples):
            tokens_BT[b, : len(example.ids)] = torch.tensor(example.ids)
            segments_BT[b, : len(example.ids)] = 1
            targets_BK[b] = torch.tensor([float(label is True) for label in example.labels])
            known_BK[b] = torch.tensor([float(label is not None) for label in example.labels])
        weights_BK = known_BK * torch.where(targets_BK > 0, self.positive_weights_K, torch.ones(()))
        return LabelBatch(tokens_BT, segments_BT, targets_BK, weights_BK)

    def loss(self, model: Labelling, batch: LabelBatch) -> Loss:
        """Term `labels`: sum over known labels, by weight. Stat: the share of known labels on their side of 1/2."""
        context = SegmentContext(batch.segments_BT)
        logits_BK = model.logits(batch.tokens_BT, batch.segments_BT.sum(dim=1), context)
        each_BK = F.binary_cross_entropy_with_logits(logits_BK, batch.targets_BK, reduction="none")
        is_known_BK = batch.weights_BK > 0
        is_right_BK = ((logits_BK > 0) == (batch.targets_BK > 0)) & is_known_BK
        stats = {"accuracy": (is_right_BK.sum(), float(is_known_BK.sum()))}
        return Loss({"labels": Term((each_BK * batch.weights_BK).sum(), batch.counts["labels"])}, stats)
