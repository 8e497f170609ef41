"""Direct preference optimisation: learning from pairs without a reward model, and its relatives.

    h      = (log pi(y1) - log pi_ref(y1)) - (log pi(y2) - log pi_ref(y2))
    q      = p (1 - s) + (1 - p) s                                  p = P(y1 preferred), s = label smoothing
    DPO    = -q log sigmoid(beta h) - (1 - q) log sigmoid(-beta h)
    IPO    = q (h - 1 / (2 beta))^2 + (1 - q) (h + 1 / (2 beta))^2

A log-probability is the sum over the completion's tokens, never a mean. p between 0 and 1 is a soft label
(Bai et al. 2022, 2212.08073, section 4.1); s is the share of labels taken to be wrong (Mitchell 2023, "A note on DPO
with noisy preferences", cDPO).

Source: Rafailov et al. 2023 (2305.18290), eq. 7; Azar et al. 2023 (2310.12036), eq. 17.
Suffixes: N completions, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.batches import Loss, PreferenceBatch, Term
from fledge.errors import DataError
from fledge.objectives.completions import (
    CompletionRegion,
    Ids,
    completion_logprobs,
    frozen_logprobs,
    lay_out_rows,
)
from fledge.objectives.next_token import Trunk

Kind = Literal["dpo", "ipo"]


@dataclass(frozen=True)
class PreferenceIds:
    """Two completions of one prompt as tokens; `preference` is the probability that the first one is preferred.

    `weight` is how much the pair counts (1 / pairs lets every prompt of a K-wise ranking count the same);
    `reference` holds the reference log-probabilities of first and second where they are known.
    """

    prompt: Ids
    first: Ids
    second: Ids
    preference: float = 1.0
    weight: float = 1.0
    reference: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise DataError("a pair holds the same completion twice; drop it")
        if not 0 <= self.preference <= 1:
            raise DataError(f"a preference is a probability from 0 to 1, got {self.preference}")
        if not 0 < self.weight < float("inf"):
            raise DataError(f"the weight of a pair must be positive, got {self.weight}")


@dataclass(frozen=True)
class Preference:
    """`beta` is the price of leaving the reference; `reference` is asked where a batch brings no reference figures."""

    max_length: int
    pad_id: int
    beta: float = 0.1
    kind: Kind = "dpo"
    label_smoothing: float = 0.0
    reference: Trunk | None = None
    region: CompletionRegion = completion_logprobs

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.kind not in ("dpo", "ipo"):
            raise ValueError(f"kind must be 'dpo' or 'ipo', got '{self.kind}'")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be from 0 to below 0.5, got {self.label_smoothing}")

    def collate(self, examples: Sequence[PreferenceIds]) -> PreferenceBatch:
        """A completion that several pairs share becomes one row. `DataError` for a row that does not fit.

        Reference figures are taken over if every example has them.
        """
        row_of: dict[tuple[Ids, Ids], int] = {}
        known: dict[int, float] = {}
        sides: list[tuple[int, int]] = []
        for pair in examples:
            first, second = (row_of.setdefault((pair.prompt, ids), len(row_of)) for ids in (pair.first, pair.second))
            sides.append((first, second))
            known.update(zip((first, second), pair.reference or (), strict=False))
        tokens_NT, segments_NT, mask_NT = lay_out_rows(list(row_of), max_length=self.max_length, pad_id=self.pad_id)
        is_known = all(pair.reference is not None for pair in examples)
        return PreferenceBatch(
            tokens_NT,
            segments_NT,
            mask_NT,
            first_P=torch.tensor([first for first, _ in sides]),
            second_P=torch.tensor([second for _, second in sides]),
            preference_P=torch.tensor([pair.preference for pair in examples], dtype=torch.float32),
            weight_P=torch.tensor([pair.weight for pair in examples], dtype=torch.float32),
            reference_N=torch.tensor([known[row] for row in range(len(row_of))]) if is_known else None,
        )

    def loss(self, model: Trunk, batch: PreferenceBatch) -> Loss:
        """Term `preference`: weighted sum over pairs. Stats: `preference_stats`."""
        logprobs_N = self.region(model, batch.tokens_NT, batch.segments_NT, batch.mask_NT)
        gain_N = logprobs_N - self._reference(batch)
        gap_P = gain_N[batch.first_P] - gain_N[batch.second_P]
        target_P = smoothed(batch.preference_P, self.label_smoothing)
        loss_P = preference_loss(gap_P, target_P, self.beta, self.kind)
        term = Term((loss_P * batch.weight_P).sum(), batch.counts["preference"])
        return Loss({"preference": term}, preference_stats(logprobs_N.detach(), gain_N.detach(), batch, self.beta))

    def _reference(self, batch: PreferenceBatch) -> Tensor:
        if batch.reference_N is not None:
            return batch.reference_N
        if self.reference is None:
            raise ValueError("the batch has no reference log-probabilities: give Preference a reference, or cache them")
        return frozen_logprobs(
            self.reference,
            batch.tokens_NT,
            batch.segments_NT,
            batch.mask_NT,
            rows=len(batch.tokens_NT),
            region=self.region,
        )


def smoothed(preference: Tensor, smoothing: float) -> Tensor:
    """The target if a share `smoothing` of the labels is wrong."""
    return preference * (1 - smoothing) + (1 - preference) * smoothing


def preference_loss(gap: Tensor, target: Tensor, beta: float, kind: Kind = "dpo") -> Tensor:
    """The loss of each pair; `gap` is h, `target` the probability that the first is preferred."""
    if kind == "ipo":
        half = 1 / (2 * beta)
        return target * (gap - half).square() + (1 - target) * (gap + half).square()
    return target * F.softplus(-beta * gap) + (1 - target) * F.softplus(beta * gap)


@torch.no_grad()
def preference_stats(
    logprobs_N: Tensor, gain_N: Tensor, batch: PreferenceBatch, beta: float
) -> dict[str, tuple[Tensor, float]]:
    """Means over the pairs with a preference (not 0.5).

    The implicit reward of a completion is beta times its log-ratio to the reference: `chosen_reward`,
    `rejected_reward`, `margin` (their difference), `accuracy` (share of pairs where it is positive; 0 counts half).
    `chosen_logprob`, `rejected_logprob`: nats a completion.
    """
    is_first_P, decided_P = batch.preference_P > 0.5, batch.preference_P != 0.5
    chosen_P = torch.where(is_first_P, batch.first_P, batch.second_P)[decided_P]
    rejected_P = torch.where(is_first_P, batch.second_P, batch.first_P)[decided_P]
    margin_P = beta * (gain_N[chosen_P] - gain_N[rejected_P])
    figures = {
        "accuracy": (margin_P > 0).float() + 0.5 * (margin_P == 0),
        "margin": margin_P,
        "chosen_reward": beta * gain_N[chosen_P],
        "rejected_reward": beta * gain_N[rejected_P],
        "chosen_logprob": logprobs_N[chosen_P],
        "rejected_logprob": logprobs_N[rejected_P],
    }
    return {name: (figure_P.sum(), float(len(chosen_P))) for name, figure_P in figures.items()}


def with_reference(
    batch: PreferenceBatch, reference: Trunk, *, rows: int, region: CompletionRegion = completion_logprobs
) -> PreferenceBatch:
    """`batch` with the reference's log-probabilities in it, so that no later epoch has to ask for them."""
    found_N = frozen_logprobs(reference, batch.tokens_NT, batch.segments_NT, batch.mask_NT, rows=rows, region=region)
    return replace(batch, reference_N=found_N)
