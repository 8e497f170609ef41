"""Rollouts through the engine: draws of their own, and log-probabilities of the policy as it is now."""

from __future__ import annotations

import pytest
import rl_toy as toy
import torch

from fledge.errors import TrainingHalted
from fledge.objectives.clipped_policy import ActionSpace
from fledge.rl.rollout import EpisodeShape, lay_out, policy_logprobs
from fledge.rl.sampler import BLOCK_SIZE, EngineSampler
from fledge.types import Completion, SamplingParams

STOPS = frozenset({toy.END})
LONG = 2 * BLOCK_SIZE + 3  # tokens: the engine keeps the keys and values of whole blocks
PARAMS = SamplingParams(max_tokens=toy.RESPONSE)


class Letters:
    """A tokenizer whose tokens are letters."""

    vocab_size, pad_id, opening = toy.VOCAB, toy.PAD, None

    def token_bytes(self, token_id: int) -> bytes:
        return toy.decode([token_id]).encode()


def sampler() -> EngineSampler:
    return EngineSampler(Letters(), STOPS)  # type: ignore[arg-type]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def long_prompts(num: int) -> list[tuple[int, ...]]:
    return [(toy.END, *(toy.LETTER_A + (start + step) % 18 for step in range(LONG - 1))) for start in range(num)]


def assert_agree(model, prompts, completions: list[Completion], temperature: float = 1.0) -> None:
    """The trainer gives every token the log-probability that the engine told."""
    shape = EpisodeShape(max(map(len, prompts)), toy.RESPONSE, toy.PAD, STOPS, toy.END)
    episodes = lay_out(prompts, completions, shape)
    found = policy_logprobs(model, episodes, ActionSpace(toy.RESPONSE, temperature, (toy.PAD,)), rows=8)
    assert torch.allclose(found, episodes.sampler_logprobs_BT, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_c10_c21_c25_trainer_and_engine_agree_about_every_token(temperature):
    model = toy.language_model()
    with torch.no_grad():
        model.head.weight[toy.PAD] += 0.5  # make padding likely, so that forgetting the ban shows
    prompts = [*toy.prompts(6), *long_prompts(2)]
    params = SamplingParams(max_tokens=toy.RESPONSE, temperature=temperature)
    said = sampler()(model, prompts, params, seeded())
    assert all(toy.PAD not in one.ids for one in said)
    assert_agree(model, prompts, said, temperature)


def test_c25_weights_that_changed_in_place_are_the_ones_that_speak():
    model, sample, prompts = toy.language_model(), sampler(), long_prompts(3)
    assert_agree(model, prompts, sample(model, prompts, PARAMS, seeded()))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=seeded(3)))
    assert_agree(model, prompts, sample(model, prompts, PARAMS, seeded()))


def test_c24_equal_prompts_have_draws_of_their_own_and_the_generator_decides_them():
    model, prompts = toy.language_model(), [toy.prompts(1)[0]] * 8
    first, again = (sampler()(model, prompts, PARAMS, seeded()) for _ in range(2))
    assert first == again
    assert len({one.ids for one in first}) > 4
    assert sampler()(model, prompts, PARAMS, seeded(1)) != first


def test_answers_come_in_the_order_of_their_prompts_and_end_at_the_end_token():
    model, prompts = toy.language_model(), toy.prompts(12)
    greedy = SamplingParams(max_tokens=toy.RESPONSE, temperature=0.0)
    together = sampler()(model, prompts, greedy, seeded())
    sample = sampler()
    assert [sample(model, [prompt], greedy, seeded())[0].ids for prompt in prompts] == [one.ids for one in together]
    for one in together:
        assert toy.END not in one.ids[:-1]
        assert (one.ids[-1] == toy.END) == (one.finish_reason == "stop")
    assert sample(model, [], greedy, seeded()) == []


def test_c49_policy_whose_prediction_is_no_number_halts():
    model = toy.language_model()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(TrainingHalted, match="not a number"):
        sampler()(model, toy.prompts(2), PARAMS, seeded())
