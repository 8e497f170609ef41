"""Completions after prompts as rows, and the log-probability a model gives each: what DPO and KTO are made of.

A row is one prompt with one completion, padded on the right to the longest of the batch. Only completion tokens pass
through the head: over a real vocabulary the logits of prompts would be most of the memory and none of the loss.
Suffixes: N rows, T positions, M completion tokens of the batch, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fledge.errors import DataError
from fledge.layers.attention import SegmentContext
from fledge.objectives.logprobs import target_logprobs
from fledge.objectives.next_token import Trunk
from fledge.objectives.padding import groups_of

Ids = tuple[int, ...]


def lay_out_rows(rows: Sequence[tuple[Ids, Ids]], *, max_length: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens_NT int64, segments_NT int32, mask_NT float32) of (prompt, completion) rows.

    `DataError` for a row of more than `max_length` tokens, without a prompt, or without a completion.
    """
    if not rows:
        raise DataError("a batch needs at least one completion")
    for prompt, completion in rows:
        if not prompt or not completion:
            raise DataError(
                f"a prompt of {len(prompt)} and a completion of {len(completion)} tokens; both need at least one"
            )
        if len(prompt) + len(completion) > max_length:
            raise DataError(
                f"a prompt of {len(prompt)} and a completion of {len(completion)} tokens are more than {max_length}; "
                "drop or shorten the row, or raise the limit"
            )
    shape = (len(rows), max(len(prompt) + len(completion) for prompt, completion in rows))
    tokens_NT = torch.full(shape, pad_id, dtype=torch.int64)
    segments_NT = torch.zeros(shape, dtype=torch.int32)
    mask_NT = torch.zeros(shape, dtype=torch.float32)
    for n, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        tokens_NT[n, :end] = torch.tensor([*prompt, *completion])
        segments_NT[n, :end] = 1
        mask_NT[n, len(prompt) : end] = 1.0
    return tokens_NT, segments_NT, mask_NT


def completion_logprobs(model: Trunk, tokens_NT: Tensor, segments_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """(N,) float32: log-probability of every row's completion, the SUM over its tokens; one forward a row."""
    sums_N = torch.zeros(len(tokens_NT), device=tokens_NT.device)
    for group in groups_of(segments_NT):
        tokens_bL, segments_bL = group.of(tokens_NT), group.of(segments_NT) * group.inside_bL
        context = SegmentContext(segments_bL)
        x_bLD = model.hidden(model.embed(tokens_bL, context), context)
        # The position before a token predicts it, so the mask of targets moves one to the left.
        is_target_bL = (group.of(mask_NT) * group.inside_bL)[:, 1:] > 0
        logprobs_M = target_logprobs(model.unembed(x_bLD[:, :-1][is_target_bL]), tokens_bL[:, 1:][is_target_bL])
        sums_N = sums_N.index_add(0, group.rows_b[is_target_bL.nonzero()[:, 0]], logprobs_M)
    return sums_N


CompletionRegion = Callable[[Trunk, Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def frozen_logprobs(
    model: Trunk,
    tokens_NT: Tensor,
    segments_NT: Tensor,
    mask_NT: Tensor,
    *,
    rows: int,
    region: CompletionRegion = completion_logprobs,
) -> Tensor:
    """`completion_logprobs` without gradients, `rows` rows at a time: what a reference model says."""
    pieces = zip(tokens_NT.split(rows), segments_NT.split(rows), mask_NT.split(rows), strict=True)
    return torch.cat([region(model, tokens, segments, mask) for tokens, segments, mask in pieces])
