"""Sampling against known answers, a slow twin in plain Python, and what must hold for any logits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fledge.infer.sampling import draw_logprobs, sample, uniforms
from fledge.types import SamplingParams

PROBS = torch.tensor([[0.05, 0.4, 0.1, 0.3, 0.15]])

logits_rows = st.integers(1, 4).flatmap(
    lambda rows: st.integers(2, 12).flatmap(
        lambda width: st.lists(
            st.lists(st.floats(-20, 20, width=16), min_size=width, max_size=width),
            min_size=rows,
            max_size=rows,
        )
    )
)
any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.floats(0.05, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
)


def slow_probs(logits: list[float], params: SamplingParams, banned: set[int]) -> list[float]:
    """The slow twin: one row, one filter after the other, renormalising after each; ties at an edge stay in."""
    best = max(score for token, score in enumerate(logits) if token not in banned)
    weights = [
        0.0 if token in banned else math.exp((score - best) / params.temperature) for token, score in enumerate(logits)
    ]

    def kept(edge: float) -> list[float]:
        survivors = [weight if weight >= edge else 0.0 for weight in probs]
        return [weight / sum(survivors) for weight in survivors]

    probs = [weight / sum(weights) for weight in weights]
    ranked = sorted(probs, reverse=True)
    if params.top_k is not None and params.top_k < len(probs):
        probs = kept(ranked[params.top_k - 1])
        ranked = sorted(probs, reverse=True)
    if params.top_p is not None and params.top_p < 1:
        mass, edge = 0.0, ranked[0]
        for prob in ranked:
            if mass >= params.top_p:
                break
            mass, edge = mass + prob, prob
        probs = kept(edge)
    if params.min_p is not None:
        probs = kept(max(probs) * params.min_p)
    return probs


def probs_of(params: SamplingParams, probs: Tensor = PROBS) -> list[float]:
    return [round(p, 6) for p in draw_logprobs(probs.log(), params).exp()[0].tolist()]


def test_top_k_keeps_the_k_most_likely_and_renormalises() -> None:
    assert probs_of(SamplingParams(top_k=2)) == [
        0,
        pytest.approx(4 / 7, abs=1e-6),
        0,
        pytest.approx(3 / 7, abs=1e-6),
        0,
    ]


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    # 0.4 + 0.3 = 0.7 falls short of 0.75, so 0.15 comes in too and makes 0.85.
    expected = [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]
    assert probs_of(SamplingParams(top_p=0.75)) == [pytest.approx(p, abs=1e-6) for p in expected]


def test_top_p_below_the_best_probability_leaves_the_best_alone() -> None:
    assert probs_of(SamplingParams(top_p=0.01)) == [0, 1, 0, 0, 0]


def test_min_p_keeps_what_reaches_that_share_of_the_best() -> None:
    # The edge is 0.3 x 0.4 = 0.12.
    expected = [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]
    assert probs_of(SamplingParams(min_p=0.3)) == [pytest.approx(p, abs=1e-6) for p in expected]


def test_top_p_measures_mass_on_what_top_k_left() -> None:
    # Of the top three (0.4, 0.3, 0.15; total 0.85) the first two hold 0.82: enough for 0.8, though 0.7 alone is not.
    assert probs_of(SamplingParams(top_k=3, top_p=0.8)) == probs_of(SamplingParams(top_k=2))


def test_filters_see_the_distribution_after_temperature() -> None:
    # At temperature 2 probabilities go as their square roots, so the best holds 0.30 instead of 0.4.
    hot = SamplingParams(temperature=2.0, top_p=0.35)
    assert sum(p > 0 for p in probs_of(hot)) == 2
    assert sum(p > 0 for p in probs_of(replace(hot, temperature=1.0))) == 1


def test_temperature_divides_the_scores() -> None:
    logits_BV = torch.tensor([[1.0, 2.0, -1.0]])
    expected = (logits_BV / 0.7).log_softmax(-1)
    assert torch.allclose(draw_logprobs(logits_BV, SamplingParams(temperature=0.7)), expected, atol=1e-6)


def test_ties_at_an_edge_share_their_fate() -> None:
    tied = torch.tensor([[0.4, 0.2, 0.2, 0.2]])
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.5)):
        assert all(p > 0 for p in probs_of(params, tied))


def test_temperature_zero_takes_the_best_with_probability_one() -> None:
    tokens_B, logprobs_B = sample(PROBS.log(), SamplingParams(temperature=0.0, top_p=0.1), torch.tensor([0.9]).double())
    assert tokens_B.tolist() == [1]
    assert logprobs_B.tolist() == [0.0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 2e-38, 1e-38, 5e-324])
def test_a_temperature_near_zero_is_greedy_without_overflow(temperature: float) -> None:
    logits_BV = torch.tensor([[300.0, 299.0, -300.0]])
    tokens_B, logprobs_B = sample(logits_BV, SamplingParams(temperature=temperature), torch.tensor([0.999]).double())
    assert tokens_B.tolist() == [0]
    assert logprobs_B.tolist() == [0.0]


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
def test_at_a_temperature_beyond_all_numbers_all_but_what_is_banned_is_equally_likely(temperature: float) -> None:
    logits_B3 = torch.tensor([[300.0, 299.0, -300.0]]).expand(4, -1)
    uniform_B = torch.tensor([0.0, 0.49, 0.51, 0.99]).double()
    tokens_B, logprobs_B = sample(logits_B3, SamplingParams(temperature=temperature), uniform_B, banned_ids=[1])
    assert tokens_B.tolist() == [0, 0, 2, 2]
    assert logprobs_B.tolist() == pytest.approx([math.log(0.5)] * 4)


def test_the_uniform_number_picks_the_token_by_cumulative_probability() -> None:
    uniform_B = torch.tensor([0.0, 0.049, 0.051, 0.449, 0.451, 0.551, 0.851, 1 - 2**-53]).double()
    tokens_B, _ = sample(PROBS.log().expand(8, -1), SamplingParams(), uniform_B)
    assert tokens_B.tolist() == [0, 0, 1, 1, 2, 3, 4, 4]


def test_a_number_of_zero_never_draws_an_excluded_first_token() -> None:
    tokens_B, logprobs_B = sample(PROBS.log(), SamplingParams(top_k=2), torch.zeros(1).double())
    assert tokens_B.tolist() == [1]
    assert logprobs_B.item() == pytest.approx(math.log(4 / 7), abs=1e-6)


def test_draws_follow_the_distribution() -> None:
    count = 20_000
    uniform_B = torch.rand(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens_B, _ = sample(PROBS.log().expand(count, -1), SamplingParams(), uniform_B)
    shares = torch.bincount(tokens_B, minlength=5) / count
    assert torch.allclose(shares, PROBS[0], atol=4 * 0.5 / math.sqrt(count))  # four standard deviations at the worst p


def test_tokens_far_below_the_step_of_float32_are_told_apart() -> None:
    # 50,000 tokens of 1e-9 each; the numbers that draw are ten tokens apart, a sixth of float32's step near one.
    logits_V = torch.full((50_001,), math.log(1e-9))
    logits_V[0] = math.log(1 - 5e-5)
    uniform_B = 1 - 4e-5 + 1e-8 * torch.arange(100, dtype=torch.float64)
    tokens_B, _ = sample(logits_V.expand(100, -1), SamplingParams(), uniform_B)
    assert tokens_B.unique().numel() == 100
    assert tokens_B.tolist() == sorted(tokens_B.tolist())


def test_nan_logits_give_a_nan_log_probability() -> None:
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=2, top_p=0.5, min_p=0.1),
    ):
        _, logprobs_B = sample(torch.tensor([[0.0, math.nan, 1.0, 2.0]]), params, torch.tensor([0.3]).double())
        assert math.isnan(logprobs_B.item())


@given(logits=logits_rows, params=any_params, uniform=st.floats(1e-12, 1, exclude_max=True), ban=st.booleans())
@settings(max_examples=200, deadline=None)
def test_sampling_agrees_with_the_slow_twin(
    logits: list[list[float]], params: SamplingParams, uniform: float, ban: bool
) -> None:
    logits_BV = torch.tensor(logits).round()  # whole scores, so that ties are common
    banned = {0} if ban else set()
    logprobs_BV = draw_logprobs(logits_BV, params, sorted(banned))
    uniform_B = torch.full((logits_BV.shape[0],), uniform, dtype=torch.float64)
    tokens_B, drawn_B = sample(logits_BV, params, uniform_B, sorted(banned))
    for row, scores in enumerate(logits_BV.tolist()):
        expected = slow_probs(scores, params, banned)
        got = logprobs_BV[row].exp().tolist()
        if not _is_on_an_edge(scores, params, banned):
            assert got == pytest.approx(expected, abs=1e-5)
        assert sum(got) == pytest.approx(1, abs=1e-5)
        token = int(tokens_B[row])
        assert got[token] > 0
        assert token not in banned
        assert float(drawn_B[row]) == pytest.approx(math.log(got[token]), abs=1e-4)


def _is_on_an_edge(scores: list[float], params: SamplingParams, banned: set[int]) -> bool:
    """Whether the twin itself would answer otherwise for a top-p or min-p that differs by rounding."""
    if params.top_p is None and params.min_p is None:
        return False
    answers = set()
    for factor in (1 - 1e-5, 1.0, 1 + 1e-5):
        moved = replace(
            params,
            top_p=None if params.top_p is None else min(1.0, params.top_p * factor),
            min_p=None if params.min_p is None else min(1.0, params.min_p * factor),
        )
        answers.add(tuple(p > 0 for p in slow_probs(scores, moved, banned)))
    return len(answers) > 1


@given(logits=logits_rows, params=any_params, seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_renaming_the_tokens_renames_the_distribution(
    logits: list[list[float]], params: SamplingParams, seed: int
) -> None:
    logits_BV = torch.tensor(logits)
    order_V = torch.randperm(logits_BV.shape[1], generator=torch.Generator().manual_seed(seed))
    renamed = draw_logprobs(logits_BV[:, order_V], params)
    assert torch.allclose(renamed.exp(), draw_logprobs(logits_BV, params)[:, order_V].exp(), atol=1e-6)


@given(logits=logits_rows, params=any_params)
@settings(max_examples=50, deadline=None)
def test_a_row_is_drawn_alike_alone_and_among_others(logits: list[list[float]], params: SamplingParams) -> None:
    logits_BV = torch.tensor(logits)
    uniform_B = torch.rand(len(logits), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens_B, logprobs_B = sample(logits_BV, params, uniform_B)
    for row in range(len(logits)):
        token_1, logprob_1 = sample(logits_BV[row : row + 1], params, uniform_B[row : row + 1])
        assert token_1.item() == tokens_B[row].item()
        assert logprob_1.item() == logprobs_B[row].item()


def test_logits_are_left_as_they_were() -> None:
    logits_BV = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    before = logits_BV.clone()
    sample(logits_BV, SamplingParams(top_k=3, top_p=0.5, min_p=0.2, temperature=0.5), torch.rand(2).double(), [1])
    assert torch.equal(logits_BV, before)


def test_half_precision_logits_are_judged_in_float32() -> None:
    logits_BV = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, logprobs_B = sample(logits_BV, SamplingParams(), torch.tensor([0.1, 0.6]).double())
    assert logprobs_B.dtype == torch.float32


def test_row_b_of_a_seeded_batch_is_row_zero_at_seed_plus_b() -> None:
    random_BN = uniforms(4, SamplingParams(max_tokens=6, seed=10), None)
    for row in range(4):
        alone = uniforms(1, SamplingParams(max_tokens=6, seed=10 + row), None)
        assert torch.equal(random_BN[row], alone[0])
    assert random_BN.unique().numel() == 24


def test_a_generator_decides_and_moves_on() -> None:
    params = SamplingParams(max_tokens=6, seed=10)
    first, again = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    one = uniforms(2, params, first)
    assert torch.equal(one, uniforms(2, params, again))
    assert not torch.equal(one, uniforms(2, params, first))
    assert not torch.equal(one, uniforms(2, params, None))


def test_no_rows_need_no_numbers() -> None:
    assert uniforms(0, SamplingParams(max_tokens=6), None).shape == (0, 6)
