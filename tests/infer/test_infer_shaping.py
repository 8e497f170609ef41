"""What a request does to its logits: known answers, and a slow twin in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.infer.shaping import Shaper, check_ids
from fledge.types import SamplingParams

VOCAB = 8
CPU = torch.device("cpu")
STOPS = (2, 5)


def shape_slowly(logits: list[float], params: SamplingParams, prompt: list[int], answer: list[int]) -> list[float]:
    scores = list(logits)
    for token in range(VOCAB):
        if params.allowed_ids is not None and token not in params.allowed_ids:
            scores[token] = -math.inf
        for biased, bias in params.logit_bias:
            scores[token] += bias if biased == token else 0.0
        if token in prompt or token in answer:
            penalty = params.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        if token in answer:
            scores[token] -= params.presence_penalty + params.frequency_penalty * answer.count(token)
        if token in STOPS and len(answer) < params.min_tokens:
            scores[token] = -math.inf
    return scores


ids = st.integers(0, VOCAB - 1)
any_params = st.builds(
    SamplingParams,
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -2.0]),
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.5]),
    logit_bias=st.lists(st.tuples(ids, st.sampled_from([-math.inf, -1.0, 3.0])), max_size=3).map(tuple),
    allowed_ids=st.none() | st.lists(ids, min_size=1).map(tuple),
    min_tokens=st.integers(0, 4),
)


@settings(deadline=None)
@given(
    st.lists(st.floats(-9, 9, width=16), min_size=VOCAB, max_size=VOCAB),
    any_params,
    st.lists(ids, min_size=1, max_size=4),
    st.lists(ids, max_size=5),
    st.integers(0, 5),
)
def test_scores_are_those_of_the_slow_twin_pushed_or_ahead(
    logits: list[float], params: SamplingParams, prompt: list[int], answer: list[int], num_ahead: int
) -> None:
    shaper = Shaper(params, prompt, STOPS, CPU)
    num_said = max(0, len(answer) - num_ahead)
    for token in answer[:num_said]:
        shaper.push(token)
    scores = torch.tensor(logits)
    shaper.apply(scores, answer[num_said:])
    expected = shape_slowly(logits, params, prompt, answer)
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert shaper.has_effect or scores.tolist() == logits


def test_penalties_follow_their_definitions() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    shaper = Shaper(params, [0], STOPS, CPU)
    for token in (1, 3, 3):
        shaper.push(token)
    scores = torch.tensor([4.0, 4.0, 4.0, -4.0])
    shaper.apply(scores)
    # In the prompt: halved. Said once: halved, less 0.5 and 0.25. Untouched. Said twice: doubled, less 0.5 and 0.5.
    assert scores.tolist() == [2.0, 1.25, 4.0, -9.0]


def test_parameters_that_ask_for_nothing_have_no_effect() -> None:
    assert not Shaper(SamplingParams(temperature=0.3, top_k=4), [1], STOPS, CPU).has_effect
    shaper = Shaper(SamplingParams(min_tokens=1), [1], STOPS, CPU)
    assert shaper.has_effect
    shaper.push(3)
    assert not shaper.has_effect


def test_ids_outside_the_vocabulary_are_refused() -> None:
    check_ids(SamplingParams(allowed_ids=(0, 7), logit_bias=((3, -math.inf),)), VOCAB)
    for params in (SamplingParams(allowed_ids=(8,)), SamplingParams(logit_bias=((-1, 1.0),))):
        with pytest.raises(UserError, match="knows 0 to 7"):
            check_ids(params, VOCAB)
