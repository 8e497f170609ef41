"""K-wise ranking: the loss of reward models.

For one prompt with K ranked completions, the mean of -log sigmoid(r_better - r_worse) over all pairs that are not
ties. Every completion passes through the model once (K forwards, not K(K-1)), all pairs of a prompt stand in one
batch, and every PROMPT weighs the same, however many pairs it has.

A pair may have a label of its own instead of the ranks': the probability p that the first is preferred (1/2 is a tie
that is learned as one) and a margin m that scores should be apart by:

    -p log sigmoid(r_1 - r_2 - m) - (1 - p) log sigmoid(r_2 - r_1 + m)

Source: Ouyang et al. 2022 (2203.02155), eq. 1; soft labels: Bai et al. 2022 (2212.08073), section 4.1; margins: Touvron
et al. 2023 (2307.09288), eq. 2. Suffixes: N completions, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.batches import Loss, RankingBatch, Term
from fledge.errors import DataError
from fledge.objectives.scores import Judge, ScoreRegion, token_scores


@dataclass(frozen=True)
class PairLabel:
    """What is known of two completions by index: P(first is preferred), and how far apart their scores should be."""

    first: int
    second: int
    preference: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True)
class RankedIds:
    """A ranking as tokens: `completions[k]` follows `prompt`; `ranks[k]` is 1 for the best, equal ranks are ties.

    `labels`, if there are any, say what is learned in place of the ranks: those pairs and no others.
    """

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    labels: tuple[PairLabel, ...] = ()

    def __post_init__(self) -> None:
        if len(self.completions) != len(self.ranks):
            raise DataError(f"a ranking needs one rank a completion: {len(self.completions)} and {len(self.ranks)}")
        if len(set(self.ranks)) < 2 and not self.labels:
            raise DataError("a ranking needs at least two different ranks; drop rankings that are all ties")
        for label in self.labels:
            if label.first == label.second or not min(label.first, label.second) >= 0:
                raise DataError(f"a label compares two different completions, got {label}")
            if max(label.first, label.second) >= len(self.completions):
                raise DataError(f"a label names completion {max(label.first, label.second)} of {len(self.completions)}")
            if not 0 <= label.preference <= 1 or not abs(label.margin) < float("inf"):
                raise DataError(f"a preference is a probability and a margin finite, got {label}")
        if not all(self.completions):
            raise DataError("a completion of a ranking has no tokens; drop it or give it an end-of-turn token")


@dataclass(frozen=True)
class KWiseRanking:
    """Rows are padded on the right to `row_length`; with `num_rows`, batches are filled with empty rows up to it.

    Fixed shapes are what lets a compiled `region` be compiled once.
    """

    row_length: int
    pad_id: int
    num_rows: int | None = None
    region: ScoreRegion | None = None

    def collate(self, examples: Sequence[RankedIds]) -> RankingBatch:
        """Whole prompts to one batch. `DataError` for a completion that does not fit, or too many of them."""
        rows = [(*ranking.prompt, *completion) for ranking in examples for completion in ranking.completions]
        num_rows = len(rows) if self.num_rows is None else self.num_rows
        longest = max(map(len, rows), default=0)
        if longest > self.row_length:
            raise DataError(f"a ranked answer has {longest} tokens with its prompt, rows hold {self.row_length}")
        if not rows or len(rows) > num_rows:
            raise DataError(f"a batch of {len(examples)} rankings has {len(rows)} answers, expected 1 to {num_rows}")
        tokens_NT = torch.full((num_rows, self.row_length), self.pad_id, dtype=torch.int64)
        segments_NT = torch.zeros((num_rows, self.row_length), dtype=torch.int32)
        ends_N = torch.zeros(num_rows, dtype=torch.int64)
        # Empty rows belong to a prompt of their own, where all of them tie: they form no pair.
        prompt_N = torch.full((num_rows,), len(examples), dtype=torch.int64)
        ranks_N = torch.zeros(num_rows, dtype=torch.int64)
        for n, row in enumerate(rows):
            tokens_NT[n, : len(row)] = torch.tensor(row)
            segments_NT[n, : len(row)] = 1
            ends_N[n] = len(row) - 1
        prompt_of = [p for p, ranking in enumerate(examples) for _ in ranking.completions]
        prompt_N[: len(rows)] = torch.tensor(prompt_of)
        ranks_N[: len(rows)] = torch.tensor([rank for ranking in examples for rank in ranking.ranks])
        weights_NN, margins_NN = pair_labels(examples, num_rows) if any(r.labels for r in examples) else (None, None)
        return RankingBatch(tokens_NT, segments_NT, ends_N, prompt_N, ranks_N, len(examples), weights_NN, margins_NN)

    def loss(self, model: Judge, batch: RankingBatch) -> Loss:
        """Term `ranking`: sum over prompts. Stats: pair accuracy and margin, mean score, pairs a prompt."""
        scores_N = last_scores(model, batch, self.region)
        if batch.weights_NN is None or batch.margins_NN is None:
            loss_sum = kwise_loss_sum(scores_N, batch.prompt_N, batch.ranks_N)
        else:
            loss_sum = labelled_loss_sum(scores_N, batch.weights_NN, batch.margins_NN)
        with torch.no_grad():
            beats_NN = strict_pairs(batch.prompt_N, batch.ranks_N)
            if batch.weights_NN is not None:  # what the labels prefer counts as the order
                beats_NN = batch.weights_NN > batch.weights_NN.T
            gap_NN = scores_N[:, None] - scores_N[None, :]
            num_pairs = float(beats_NN.sum())
            is_real_N = batch.prompt_N < batch.num_prompts
            stats = {
                "accuracy": (((gap_NN > 0) & beats_NN).sum(), num_pairs),
                "margin": ((gap_NN * beats_NN).sum(), num_pairs),
                "score": ((scores_N * is_real_N).sum(), float(is_real_N.sum())),
                "pairs_per_prompt": (beats_NN.sum(), float(batch.num_prompts)),
            }
        return Loss({"ranking": Term(loss_sum, float(batch.num_prompts))}, stats)


def last_scores(model: Judge, batch: RankingBatch, region: ScoreRegion | None = None) -> Tensor:
    """scores_N: what the model says at the last real token of each row."""
    scores_NT = token_scores(model, batch.tokens_NT, batch.segments_NT, region)
    return scores_NT.gather(1, batch.ends_N[:, None]).squeeze(1)


def strict_pairs(prompt_N: Tensor, ranks_N: Tensor) -> Tensor:
    """beats_NN[i, j]: i and j answer the same prompt and i is ranked strictly better."""
    return (prompt_N[:, None] == prompt_N[None, :]) & (ranks_N[:, None] < ranks_N[None, :])


def kwise_loss_sum(scores_N: Tensor, prompt_N: Tensor, ranks_N: Tensor) -> Tensor:
    """Sum over prompts of the mean over the prompt's strict pairs of -log sigmoid(r_better - r_worse), in nats."""
    beats_NN = strict_pairs(prompt_N, ranks_N)
    pairs_N = beats_NN.sum(dim=1)
    same_prompt_NN = prompt_N[:, None] == prompt_N[None, :]
    pairs_of_prompt_N = (same_prompt_NN * pairs_N[None, :]).sum(dim=1)
    weight_NN = beats_NN / pairs_of_prompt_N.clamp(min=1)[:, None]
    gap_NN = scores_N[:, None] - scores_N[None, :]
    return (F.softplus(-gap_NN) * weight_NN).sum()


def labelled_loss_sum(scores_N: Tensor, weights_NN: Tensor, margins_NN: Tensor) -> Tensor:
    """Sum over prompts of the mean over the prompt's labelled pairs of their loss, in nats."""
    gap_NN = scores_N[:, None] - scores_N[None, :]
    return (F.softplus(margins_NN - gap_NN) * weights_NN).sum()


def pair_labels(examples: Sequence[RankedIds], num_rows: int) -> tuple[Tensor, Tensor]:
    """(weights_NN, margins_NN) of a batch: an example without labels is given those that its ranks imply."""
    weights_NN, margins_NN = torch.zeros(num_rows, num_rows), torch.zeros(num_rows, num_rows)
    start = 0
    for example in examples:
        labels = example.labels or implied_labels(example.ranks)
        for label in labels:
            i, j = start + label.first, start + label.second
            weights_NN[i, j] += label.preference / len(labels)
            weights_NN[j, i] += (1 - label.preference) / len(labels)
            margins_NN[i, j], margins_NN[j, i] = label.margin, -label.margin
        start += len(example.completions)
    return weights_NN, margins_NN


def implied_labels(ranks: Sequence[int]) -> list[PairLabel]:
    """All pairs of different rank, the better one first."""
    places = range(len(ranks))
    return [PairLabel(i, j) for i in places for j in places if ranks[i] < ranks[j]]
