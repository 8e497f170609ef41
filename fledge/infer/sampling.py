"""Drawing tokens from logits: temperature, top-k, top-p, min-p, for a whole batch at once, each row by its own rules.

Used by every way of generating (naive.py and the engine), so that a token and its log-probability mean the same
everywhere: a row's draw depends on its own scores, parameters and random number alone. What comes before the
temperature is in shaping.py. Every filter is a threshold on the scores, so two tokens of equal probability always
share their fate: ties at the edge stay in. Sources: top-k, Fan et al. 2018, section 5.4; top-p, Holtzman et al. 2020,
section 3.1; min-p, Nguyen et al. 2024, section 3.

Shapes: B rows, V vocabulary, N steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fledge.types import SamplingParams

# Below the smallest normal float32 a division by the temperature is no longer defined; the limit is greedy.
_COLDEST = float(torch.finfo(torch.float32).tiny)
# So many of the best scores are looked at for the edge of the nucleus before all of them are sorted. Of 50,000 on one
# core: 0.4 ms a row instead of 4.
_NUCLEUS_GUESS = 256


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
    return draw(_ban(logits_BV.float(), banned_ids), [params] * logits_BV.shape[0], uniform_B)


def draw(scores_BV: Tensor, params: Sequence[SamplingParams], uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """`sample` with parameters of its own for every row, from float32 scores that are shaped and banned already."""
    greedy = [row for row, own in enumerate(params) if _is_greedy(own)]
    if len(greedy) == len(params):
        tokens_B = _best(scores_BV)
        best_B = scores_BV.gather(1, tokens_B[:, None])[:, 0]
        return tokens_B, best_B - best_B  # 0, or NaN where the scores were
    if not greedy:
        return invert(_filter(scores_BV, params).softmax(dim=-1), uniform_B)
    others = [row for row, own in enumerate(params) if not _is_greedy(own)]
    tokens_B = torch.empty(len(params), dtype=torch.int64, device=scores_BV.device)
    logprobs_B = torch.empty(len(params), device=scores_BV.device)
    for rows in (greedy, others):
        index = torch.tensor(rows, device=scores_BV.device)
        drawn = draw(scores_BV[index], [params[row] for row in rows], uniform_B[index])
        tokens_B[index], logprobs_B[index] = drawn
    return tokens_B, logprobs_B


def invert(probs_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens_B, logprobs_B): the token at which the cumulative distribution passes `uniform_B` of its whole."""
    # float64: the tail of a large vocabulary is finer than float32's step near one.
    cumulative_BV = probs_BV.cumsum(dim=-1, dtype=torch.float64)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    # The first entry above the target has positive probability; clamping only catches NaN rows.
    tokens_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_(max=probs_BV.shape[1] - 1)
    return tokens_B1[:, 0], probs_BV.gather(1, tokens_B1).log_()[:, 0]


def draw_logprobs(logits_BV: Tensor, params: SamplingParams, banned_ids: Sequence[int] = ()) -> Tensor:
    """(B, V) float32: log of the distribution that `sample` draws from, minus infinity for what it never draws."""
    scores_BV = _ban(logits_BV.float(), banned_ids)
    if _is_greedy(params):
        chosen_BV = torch.full_like(scores_BV, float("-inf"))
        return chosen_BV.scatter(1, _best(scores_BV)[:, None], 0.0)
    return _filter(scores_BV, [params] * scores_BV.shape[0]).log_softmax(dim=-1)


def _best(scores_BV: Tensor) -> Tensor:
    """tokens_B: the first of the best, NaN counting as the best of all."""
    if scores_BV.device.type != "cpu":
        return scores_BV.argmax(dim=-1)
    # numpy looks at 16 at once: a quarter of torch's time for 32 rows of 50,000.
    return torch.from_numpy(scores_BV.detach().numpy().argmax(axis=-1))


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < _COLDEST


def _ban(scores_BV: Tensor, banned_ids: Sequence[int]) -> Tensor:
    if not banned_ids:
        return scores_BV
    index = torch.tensor(banned_ids, device=scores_BV.device)
    return scores_BV.index_fill(1, index, float("-inf"))


def _filter(scores_BV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Temperature, top-k, top-p and min-p, each on the renormalised distribution that the one before left."""
    stages: tuple[tuple[Callable[[Tensor, Tensor], Tensor], list[float | None]], ...] = (
        (_cool, [None if own.temperature == 1.0 else own.temperature for own in params]),
        (
            _keep_best,
            [None if own.top_k is None or own.top_k >= scores_BV.shape[1] else own.top_k for own in params],
        ),
        (_keep_nucleus, [None if own.top_p == 1.0 else own.top_p for own in params]),
        (_keep_likely, [math.log(own.min_p) if own.min_p else None for own in params]),
    )
    for stage, settings in stages:
        rows = [row for row, setting in enumerate(settings) if setting is not None]
        if not rows:
            continue
        setting_B = torch.tensor([settings[row] for row in rows], dtype=torch.float64, device=scores_BV.device)
        setting_B1 = setting_B[:, None]
        if len(rows) == len(params):
            scores_BV = stage(scores_BV, setting_B1)
        else:
            index = torch.tensor(rows, device=scores_BV.device)
            scores_BV = scores_BV.index_copy(0, index, stage(scores_BV[index], setting_B1))
    return scores_BV


def _cool(scores_BV: Tensor, temperature_B1: Tensor) -> Tensor:
    # The best score is moved to 0 first, so that a low temperature cannot overflow it.
    # And a temperature beyond float32 must not become infinity, or what is banned becomes NaN.
    hottest = torch.finfo(torch.float32).max
    return (scores_BV - scores_BV.amax(dim=-1, keepdim=True)) / temperature_B1.clamp(max=hottest).float()


def _keep_best(scores_BV: Tensor, top_k_B1: Tensor) -> Tensor:
    place_B1 = top_k_B1.long() - 1
    best_BK = scores_BV.topk(int(place_B1.max()) + 1, dim=-1).values
    return _at_least(scores_BV, best_BK.gather(1, place_B1))


def _keep_nucleus(scores_BV: Tensor, top_p_B1: Tensor) -> Tensor:
    """The smallest set of most likely tokens whose probability reaches `top_p`."""
    vocab_size = scores_BV.shape[1]
    whole_B1 = scores_BV.double().logsumexp(dim=-1, keepdim=True)
    edge_B1, is_found_B1 = _nucleus_edge(scores_BV, whole_B1, top_p_B1, min(_NUCLEUS_GUESS, vocab_size))
    missing = (~is_found_B1[:, 0]).nonzero()[:, 0]
    if vocab_size > _NUCLEUS_GUESS and len(missing):
        exact, _ = _nucleus_edge(scores_BV[missing], whole_B1[missing], top_p_B1[missing], vocab_size)
        edge_B1[missing] = exact
    return _at_least(scores_BV, edge_B1)


def _nucleus_edge(scores_BV: Tensor, whole_B1: Tensor, top_p_B1: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """(edge_B1, is_found_B1): the lowest score in the nucleus, if it ends within the `num_best` best scores.

    `whole_B1` is the logarithm of the sum of all weights.
    """
    best_BK = scores_BV.topk(num_best, dim=-1).values
    probs_BK = (best_BK.double() - whole_B1).exp()
    reached_BK = probs_BK.cumsum(dim=-1)
    num_kept_B1 = (reached_BK - probs_BK < top_p_B1).sum(dim=-1, keepdim=True)  # 0 only for NaN
    edge_B1 = best_BK.gather(1, (num_kept_B1 - 1).clamp_(min=0))
    return edge_B1, reached_BK[:, -1:] >= top_p_B1


def _keep_likely(scores_BV: Tensor, log_min_p_B1: Tensor) -> Tensor:
    return _at_least(scores_BV, scores_BV.amax(dim=-1, keepdim=True) + log_min_p_B1.float())


def _at_least(scores_BV: Tensor, edge_B1: Tensor) -> Tensor:
    return scores_BV.masked_fill(scores_BV < edge_B1, float("-inf"))
