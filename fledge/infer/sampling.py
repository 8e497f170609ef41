"""Drawing tokens from logits: temperature, top-k, top-p, min-p, for a whole batch at once.

Used by every way of generating (naive.py now, the engine later), so that a token and its log-probability mean the same
everywhere. Every filter is a threshold on the scores, so two tokens of equal probability always share their fate:
ties at the edge stay in. Sources: top-k, Fan et al. 2018, section 5.4; top-p, Holtzman et al. 2020, section 3.1;
min-p, Nguyen et al. 2024, section 3.

Shapes: B rows, V vocabulary, N steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fledge.types import SamplingParams

# Below the smallest normal float32 a division by the temperature is no longer defined; the limit is greedy.
_COLDEST = float(torch.finfo(torch.float32).tiny)


def uniforms(num_rows: int, params: SamplingParams, generator: torch.Generator | None) -> Tensor:
    """The randomness of a whole generation, (B, N) float64 in [0, 1): entry (b, n) draws token n of row b.

    Fixed before the first step, so a row's draws depend neither on what its neighbours say nor on when they end.
    Without a generator row b has the seed `params.seed + b`: the b-th answer of a batch is the first one of a batch
    that starts at that seed.
    """
    shape = (num_rows, params.max_tokens)
    if generator is not None:
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    random_BN = torch.empty(shape, dtype=torch.float64)
    for row, random_N in enumerate(random_BN):
        random_N.uniform_(generator=torch.Generator().manual_seed(params.seed + row))
    return random_BN


def sample(
    logits_BV: Tensor, params: SamplingParams, uniform_B: Tensor, banned_ids: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """(tokens_B int64, logprobs_B float32): one token a row, and its log-probability where it was drawn.

    The log-probability is that under the distribution after banning, temperature and filters; a greedy choice has
    probability one, so its log-probability is 0. `uniform_B` (float64 in [0, 1)) decides by inversion of the
    cumulative distribution; greedy choices ignore it. Log-probabilities in place of logits give the same draws. NaN
    logits, or a row with every token banned, give a NaN log-probability.
    """
    scores_BV = _ban(logits_BV.float(), banned_ids)
    if _is_greedy(params):
        best_B, tokens_B = scores_BV.max(dim=-1)
        return tokens_B, best_B - best_B  # 0, or NaN where the scores were
    probs_BV = _filter(_cool(scores_BV, params.temperature), params).softmax(dim=-1)
    # float64: the tail of a large vocabulary is finer than float32's step near one.
    cumulative_BV = probs_BV.cumsum(dim=-1, dtype=torch.float64)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    # The first entry above the target has positive probability; clamping only catches NaN rows.
    tokens_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_(max=logits_BV.shape[1] - 1)
    return tokens_B1[:, 0], probs_BV.gather(1, tokens_B1).log_()[:, 0]


def draw_logprobs(logits_BV: Tensor, params: SamplingParams, banned_ids: Sequence[int] = ()) -> Tensor:
    """(B, V) float32: log of the distribution that `sample` draws from, minus infinity for what it never draws."""
    scores_BV = _ban(logits_BV.float(), banned_ids)
    if _is_greedy(params):
        chosen_BV = torch.full_like(scores_BV, float("-inf"))
        return chosen_BV.scatter(1, scores_BV.argmax(dim=-1, keepdim=True), 0.0)
    return _filter(_cool(scores_BV, params.temperature), params).log_softmax(dim=-1)


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < _COLDEST


def _ban(scores_BV: Tensor, banned_ids: Sequence[int]) -> Tensor:
    if not banned_ids:
        return scores_BV
    index = torch.tensor(banned_ids, device=scores_BV.device)
    return scores_BV.index_fill(1, index, float("-inf"))


def _cool(scores_BV: Tensor, temperature: float) -> Tensor:
    if temperature == 1.0:
        return scores_BV
    # The best score is moved to 0 first, so that a low temperature cannot overflow it.
    return (scores_BV - scores_BV.amax(dim=-1, keepdim=True)) / temperature


def _filter(scores_BV: Tensor, params: SamplingParams) -> Tensor:
    """Top-k, then top-p, then min-p, each on the renormalised distribution that the one before left."""
    if params.top_k is not None and params.top_k < scores_BV.shape[1]:
        scores_BV = _at_least(scores_BV, scores_BV.topk(params.top_k, dim=-1).values[:, -1:])
    if params.top_p is not None and params.top_p < 1:
        scores_BV = _at_least(scores_BV, _nucleus_edge(scores_BV, params.top_p))
    if params.min_p is not None and params.min_p > 0:
        scores_BV = _at_least(scores_BV, scores_BV.amax(dim=-1, keepdim=True) + math.log(params.min_p))
    return scores_BV


def _nucleus_edge(scores_BV: Tensor, top_p: float) -> Tensor:
    """The lowest score (B, 1) in the smallest set of most likely tokens whose probability reaches `top_p`."""
    sorted_BV = scores_BV.sort(dim=-1, descending=True).values
    probs_BV = sorted_BV.double().softmax(dim=-1)
    before_BV = probs_BV.cumsum(dim=-1) - probs_BV  # mass of the tokens ranked above; 0 for the first
    num_kept_B1 = (before_BV < top_p).sum(dim=-1, keepdim=True)
    return sorted_BV.gather(1, (num_kept_B1 - 1).clamp_(min=0))


def _at_least(scores_BV: Tensor, edge_B1: Tensor) -> Tensor:
    return scores_BV.masked_fill(scores_BV < edge_B1, float("-inf"))
