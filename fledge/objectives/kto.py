"""Kahneman-Tversky optimisation: learning from single answers that were found good or bad.

    r = log pi(y|x) - log pi_ref(y|x)          z0 = max(0, mean over mismatched (x, y') of r)        no gradient
    v = lambda_D sigmoid(beta (r - z0))  if desirable,  lambda_U sigmoid(beta (z0 - r))  if not
    loss = lambda_y - v

z0 estimates KL(pi || pi_ref): answers to OTHER prompts of the batch stand for draws from the policy. It belongs to
the whole batch, so a caller who splits one into micro-batches computes it beforehand (`baseline`) and puts it in each.

Source: Ethayarajh et al. 2024 (2402.01306), section 4.1, eq. 7 and 8. Suffixes: B judged rows, N all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fledge.batches import Loss, Term, VerdictBatch
from fledge.errors import DataError
from fledge.objectives.completions import (
    CompletionRegion,
    Ids,
    completion_logprobs,
    frozen_logprobs,
    lay_out_rows,
)
from fledge.objectives.next_token import Trunk


@dataclass(frozen=True)
class VerdictIds:
    """One completion as tokens and whether it was found good. `stranger` answers another prompt (see `mismatch`).

    `reference` holds the reference log-probabilities of completion and of stranger where they are known.
    """

    prompt: Ids
    completion: Ids
    desirable: bool
    stranger: Ids
    reference: tuple[float, float] | None = None


def mismatch(verdicts: Sequence[tuple[Ids, Ids, bool]], *, max_length: int) -> list[VerdictIds]:
    """(prompt, completion, desirable) with, for each, the completion of the next one that has another prompt.

    A stranger that does not fit behind the prompt is cut. `DataError` if all prompts are the same.
    """
    found = []
    for place, (prompt, completion, desirable) in enumerate(verdicts):
        following = (*verdicts[place + 1 :], *verdicts[:place])
        stranger = next((ids for other, ids, _ in following if other != prompt), None)
        if stranger is None:
            raise DataError(
                "KTO's baseline needs two different prompts in a batch; shuffle the data or raise the batch"
            )
        found.append(VerdictIds(prompt, completion, desirable, stranger[: max(1, max_length - len(prompt))]))
    return found


def balanced_weights(num_desirable: int, num_undesirable: int) -> tuple[float, float]:
    """(lambda_D, lambda_U) that let both kinds count the same, the rarer one raised (Ethayarajh et al. 2024, eq. 9)."""
    if num_desirable < 1 or num_undesirable < 1:
        raise DataError(f"KTO needs both kinds of answers, got {num_desirable} desirable, {num_undesirable} not")
    return max(1.0, num_undesirable / num_desirable), max(1.0, num_desirable / num_undesirable)


@dataclass(frozen=True)
class KTO:
    """`beta` is the price of leaving the reference; the weights are lambda_D and lambda_U."""

    max_length: int
    pad_id: int
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: Trunk | None = None
    region: CompletionRegion = completion_logprobs

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def collate(self, examples: Sequence[VerdictIds]) -> VerdictBatch:
        """The judged rows, then as many mismatched ones. `DataError` for a row that does not fit."""
        judged = [(verdict.prompt, verdict.completion) for verdict in examples]
        mismatched = [(verdict.prompt, verdict.stranger) for verdict in examples]
        laid_out = lay_out_rows([*judged, *mismatched], max_length=self.max_length, pad_id=self.pad_id)
        figures = [verdict.reference for verdict in examples if verdict.reference is not None]
        reference_N = torch.tensor(figures).T.flatten() if len(figures) == len(examples) else None
        desirable_B = torch.tensor([verdict.desirable for verdict in examples])
        return VerdictBatch(*laid_out, desirable_B=desirable_B, reference_N=reference_N)

    @torch.no_grad()
    def baseline(self, model: Trunk, batches: Sequence[VerdictBatch]) -> Tensor:
        """z0 over the mismatched rows of all `batches` together."""
        gains = [self._gain(model, batch, slice(len(batch.desirable_B), None)) for batch in batches]
        return torch.cat(gains).mean().clamp(min=0)

    def loss(self, model: Trunk, batch: VerdictBatch) -> Loss:
        """Term `kto`: sum over judged rows. Stats: see below; z0 is the batch's own where it brings none."""
        z0 = self.baseline(model, [batch]) if batch.baseline is None else batch.baseline
        gain_B = self._gain(model, batch, slice(0, len(batch.desirable_B)))
        loss_B = kto_loss(
            gain_B, batch.desirable_B, z0, beta=self.beta, weights=(self.desirable_weight, self.undesirable_weight)
        )
        return Loss({"kto": Term(loss_B.sum(), batch.counts["kto"])}, self._stats(gain_B.detach(), z0, batch))

    def _gain(self, model: Trunk, batch: VerdictBatch, rows: slice) -> Tensor:
        """log pi - log pi_ref of the completions of some rows."""
        inputs = (batch.tokens_NT[rows], batch.segments_NT[rows], batch.mask_NT[rows])
        if batch.reference_N is not None:
            reference = batch.reference_N[rows]
        elif self.reference is not None:
            reference = frozen_logprobs(self.reference, *inputs, rows=len(inputs[0]), region=self.region)
        else:
            raise ValueError("the batch has no reference log-probabilities: give KTO a reference, or cache them")
        return self.region(model, *inputs) - reference

    def _stats(self, gain_B: Tensor, z0: Tensor, batch: VerdictBatch) -> dict[str, tuple[Tensor, float]]:
        """`desirable_reward`, `undesirable_reward`: beta times the log-ratio, means over their kind; `kl_baseline`: z0;
        `accuracy`: share of rows on their side of z0."""
        good_B = batch.desirable_B
        is_right_B = torch.where(good_B, gain_B > z0, gain_B < z0)
        return {
            "desirable_reward": (self.beta * gain_B[good_B].sum(), float(good_B.sum())),
            "undesirable_reward": (self.beta * gain_B[~good_B].sum(), float((~good_B).sum())),
            "kl_baseline": (z0, 1.0),
            "accuracy": (is_right_B.sum(), float(len(good_B))),
        }


def kto_loss(gain_B: Tensor, desirable_B: Tensor, z0: Tensor, *, beta: float, weights: tuple[float, float]) -> Tensor:
    """lambda_y - v of each judged row; `weights` are (lambda_D, lambda_U)."""
    sign_B = torch.where(desirable_B, 1.0, -1.0)
    weight_B = torch.where(desirable_B, *weights)
    return weight_B * torch.sigmoid(-beta * sign_B * (gain_B - z0))


def with_kto_reference(
    batch: VerdictBatch, reference: Trunk, *, rows: int, region: CompletionRegion = completion_logprobs
) -> VerdictBatch:
    """`batch` with the reference's log-probabilities in it, so that no later epoch has to ask for them."""
    found_N = frozen_logprobs(reference, batch.tokens_NT, batch.segments_NT, batch.mask_NT, rows=rows, region=region)
    return replace(batch, reference_N=found_N)
