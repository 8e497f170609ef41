"""A step's tokens: every row by its own rules, bit for bit as if it were alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fledge.infer.choosing import Row, choose, read_logprobs
from fledge.infer.sampling import draw, sample
from fledge.infer.shaping import Shaper
from fledge.types import SamplingParams

VOCAB = 400
CPU = torch.device("cpu")
NOBODY = torch.tensor([], dtype=torch.int64)

any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 500),
    top_p=st.none() | st.floats(0.05, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
)


def logits_of(num_rows: int, seed: int) -> Tensor:
    """Some sharp, some so flat that a nucleus needs more than the first few hundred."""
    generator = torch.Generator().manual_seed(seed)
    scale_R1 = torch.tensor([0.01, 1.0, 5.0, 20.0])[torch.randint(4, (num_rows, 1), generator=generator)]
    return torch.randn(num_rows, VOCAB, generator=generator) * scale_R1


def row_of(params: SamplingParams, uniform: float = 0.5, **more) -> Row:
    return Row(params, Shaper(params, [1], [2], CPU), uniform, **more)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(any_params, st.floats(0, 0.999)), min_size=1, max_size=8), st.integers(0, 99))
def test_every_row_draws_bit_for_bit_as_if_it_were_alone(
    settings_R: list[tuple[SamplingParams, float]], seed: int
) -> None:
    logits_RV = logits_of(len(settings_R), seed)
    banned = torch.tensor([3, 5])
    chosen = choose(logits_RV.clone(), [row_of(*own) for own in settings_R], banned)
    for place, (params, uniform) in enumerate(settings_R):
        uniform_1 = torch.tensor([uniform], dtype=torch.float64)
        token, logprob = sample(logits_RV[place : place + 1], params, uniform_1, [3, 5])
        assert chosen[place].token == token.item()
        assert chosen[place].logprob == pytest.approx(logprob.item(), abs=1e-6)
        alone = choose(logits_RV[place : place + 1].clone(), [row_of(params, uniform)], banned)
        assert alone[0].token == chosen[place].token


def test_a_nucleus_found_among_the_best_is_the_one_found_by_sorting_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits_RV = logits_of(40, seed=3)
    params = [SamplingParams(top_p=0.02 + place / 41) for place in range(40)]
    uniform_R = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    quick = draw(logits_RV, params, uniform_R)
    for guess in (1, 7, VOCAB):
        monkeypatch.setattr("fledge.infer.sampling._NUCLEUS_GUESS", guess)
        for got, expected in zip(quick, draw(logits_RV, params, uniform_R), strict=True):
            assert torch.equal(got, expected)


def test_the_models_own_log_probabilities_are_those_before_anything_else() -> None:
    logits_RV = logits_of(2, seed=1)
    params = SamplingParams(temperature=0.3, logit_bias=((7, 100.0),))
    plain, asked = row_of(SamplingParams(temperature=0.0)), row_of(params, num_top=3)
    chosen = choose(logits_RV.clone(), [plain, asked], torch.tensor([3]))
    own = logits_RV[1].log_softmax(-1)
    assert chosen[0].model is None
    assert chosen[1].token == 7
    assert chosen[1].model.logprob == pytest.approx(own[7].item(), abs=1e-6)
    assert chosen[1].model.rank == 1 + int((own > own[7]).sum())
    assert chosen[1].model.top == tuple(
        (token, pytest.approx(value))
        for token, value in zip(own.topk(3).indices.tolist(), own.topk(3).values.tolist(), strict=True)
    )


def test_more_alternatives_than_tokens_are_all_of_them() -> None:
    logprobs = torch.tensor([[0.2, 0.5, 0.3]]).log()
    [found] = read_logprobs(logprobs, torch.tensor([2]), [20])
    assert [token for token, _ in found.top] == [1, 2, 0]
    assert found.rank == 2


def only(*allowed: int) -> Tensor:
    """What a grammar says that allows some tokens."""
    mask_V = torch.zeros(VOCAB, dtype=torch.bool)
    mask_V[list(allowed)] = True
    return mask_V


def test_a_grammar_binds_its_own_row_only() -> None:
    logits_RV = logits_of(2, seed=2)
    logits_RV[:, 9] = 40.0
    greedy = SamplingParams(temperature=0.0)
    free, bound = choose(logits_RV, [row_of(greedy), row_of(greedy, allowed=only(11))], NOBODY)
    assert (free.token, bound.token) == (9, 11)


def test_a_row_with_nothing_left_to_draw_gives_no_number() -> None:
    for params in (SamplingParams(temperature=0.0), SamplingParams()):
        [choice] = choose(logits_of(1, seed=2), [row_of(params, allowed=only(11))], torch.tensor([11]))
        assert math.isnan(choice.logprob)
