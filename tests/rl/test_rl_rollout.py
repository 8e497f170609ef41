"""From prompts to episodes: layout, masks, padding that changes nothing, and agreement of sampler and trainer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import rl_toy as toy
import torch

from fledge.errors import DataError
from fledge.layers.attention import RowContext, SegmentContext
from fledge.models.pocket import Pocket, PocketConfig
from fledge.models.scalar import ScalarModel
from fledge.objectives.clipped_policy import ActionSpace
from fledge.objectives.clipped_value import action_values
from fledge.rl.rollout import (
    EpisodeShape,
    RewardModelScorer,
    lay_out,
    naive_sampler,
    policy_logprobs,
    state_values,
    truncate,
)
from fledge.types import Completion, SamplingParams

END, PAD, STOP = 0, 1, 5
SHAPE = EpisodeShape(prompt_length=4, response_length=5, pad_id=PAD, stop_ids=frozenset({END, STOP}), end_id=END)
SPACE = ActionSpace(toy.RESPONSE, banned_ids=(toy.PAD,))


def said(*ids: int) -> Completion:
    return Completion("", ids, tuple(-0.1 * (i + 1) for i in range(len(ids))), "stop")


def toy_shape() -> EpisodeShape:
    return EpisodeShape(toy.PROMPT, toy.RESPONSE, toy.PAD, frozenset({toy.END}), toy.END)


def sampled(model, temperature: float = 1.0):
    """Prompts of many lengths, and the episodes a model says to them."""
    prompts = toy.prompts(16)
    params = SamplingParams(max_tokens=toy.RESPONSE, temperature=temperature)
    sampler = naive_sampler(pad_id=toy.PAD, stop_ids=frozenset({toy.END}), decode=toy.decode)
    completions = sampler(model, prompts, params, torch.Generator().manual_seed(0))
    return prompts, completions, lay_out(prompts, completions, toy_shape())


def scalar() -> ScalarModel:
    return ScalarModel.from_trunk("llama", toy.language_model(), generator=torch.Generator().manual_seed(1))


def test_prompt_stands_left_padded_before_a_right_padded_response():
    episodes = lay_out([(7, 8), (9, 9, 9, 9)], [said(6, 6, END), said(7)], SHAPE)
    assert episodes.tokens_BT.tolist() == [[1, 1, 7, 8, 6, 6, 0, 1, 1], [9, 9, 9, 9, 7, 1, 1, 1, 1]]
    assert episodes.segments_BT.tolist() == [[0, 0, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0]]
    assert episodes.sampler_logprobs_BT[0].tolist() == pytest.approx([0, 0, 0, 0, -0.1, -0.2, -0.3, 0, 0])


def test_c6_mask_covers_the_first_response_token_to_the_end_inclusive_and_nothing_after():
    episodes = lay_out([(END, 8), (7,)], [said(6, 6, END), said(7)], SHAPE)
    assert episodes.action_mask_BT.tolist() == [[0, 0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0]]


def test_c7_answer_is_cut_after_its_first_stop_token_and_at_the_response_length():
    assert truncate((6, END, 7, END), SHAPE) == (6, END)
    assert truncate((6, STOP, 7), SHAPE) == (6, STOP)
    assert truncate((6, 7, 8, 9, 6, END), SHAPE) == (6, 7, 8, 9, 6)
    episodes = lay_out([(7,)], [said(6, END, 7, 8)], SHAPE)
    assert episodes.tokens_BT[0].tolist() == [1, 1, 1, 7, 6, END, 1, 1, 1]


def test_c7_reward_model_sees_the_cut_answer_and_is_read_at_its_last_token():
    model = scalar()
    long = said(6, 7, toy.END, 9, 9)
    short = said(6, 7, toy.END)
    shape = replace(toy_shape(), response_length=5)
    scores = RewardModelScorer(model)(lay_out([(7,), (7,)], [long, short], shape))
    alone = torch.tensor([[7, 6, 7, toy.END]])
    with torch.no_grad():
        expected = model.scores(alone, RowContext(alone))[0, -1]
    assert scores.tolist() == pytest.approx([expected.item()] * 2, abs=1e-5)


def test_c23_only_the_end_token_of_the_response_ends_an_answer():
    episodes = lay_out(
        [(END, 7), (END,), (7,), (7,)],
        [said(6, 6), said(6, STOP), said(6, END), said(6, 6, 6, 6, 6, END)],
        SHAPE,
    )
    assert episodes.ended_B.tolist() == [False, False, True, False]


def test_c10_episodes_hold_exactly_the_ids_that_were_sampled():
    prompts, completions, episodes = sampled(toy.language_model())
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        real = episodes.segments_BT[row] == 1
        assert episodes.tokens_BT[row, real].tolist() == [*prompt, *completion.ids]


def test_prompt_that_is_too_long_and_an_empty_answer_are_refused():
    for prompt, completion in (((7,) * 5, said(6)), ((), said(6)), ((7,), Completion("", (), (), "length"))):
        with pytest.raises(DataError, match="episode 0"):
            lay_out([prompt], [completion], SHAPE)


def test_c1_padding_that_is_an_end_token_is_refused():
    with pytest.raises(ValueError, match="pad id"):
        replace(SHAPE, stop_ids=frozenset({END, PAD}))
    with pytest.raises(ValueError, match="end id"):
        replace(SHAPE, stop_ids=frozenset({STOP}))


@pytest.mark.parametrize("family", ["llama", "pocket"])
def test_c2_c3_neither_left_padding_nor_neighbours_change_a_log_probability(family):
    model = toy.language_model()
    if family == "pocket":
        model = Pocket(PocketConfig(toy.VOCAB, 32, 2, 1, table_rows=64))
        model.init_weights(torch.Generator().manual_seed(0))
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    prompts, completions, together = sampled(model)
    found = policy_logprobs(model, together, SPACE, rows=16)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        shape = replace(toy_shape(), prompt_length=len(prompt), response_length=len(completion.ids))
        alone = lay_out([prompt], [completion], shape)
        assert int(alone.segments_BT.min()) == 1, "no padding at all"
        expected = policy_logprobs(model, alone, replace(SPACE, response_length=len(completion.ids)), rows=1)
        actions = together.action_mask_BT[row] > 0
        assert torch.allclose(found[row, actions], expected[0, len(prompt) :], atol=1e-5)


def test_c2_positions_count_from_the_first_real_token():
    _, _, episodes = sampled(toy.language_model())
    positions = SegmentContext(episodes.segments_BT).positions_BT
    expected = episodes.segments_BT.cumsum(1) - episodes.segments_BT
    real = episodes.segments_BT == 1
    assert torch.equal(positions[real], expected[real])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_c5_c21_c22_c25_sampler_and_trainer_agree_about_every_token(temperature):
    model = toy.language_model()
    with torch.no_grad():
        model.head.weight[toy.PAD] += 0.5  # make padding likely, so that forgetting the ban shows
    _, _, episodes = sampled(model, temperature)
    space = replace(SPACE, temperature=temperature)
    trainer = policy_logprobs(model, episodes, space, rows=16)
    assert torch.allclose(trainer, episodes.sampler_logprobs_BT, atol=1e-4)


def test_rows_at_a_time_change_nothing():
    model, judge = toy.language_model(), scalar()
    _, _, episodes = sampled(model)

    def asked(rows: int) -> torch.Tensor:
        logprobs = policy_logprobs(model, episodes, SPACE, rows=rows)
        values = state_values(judge, episodes, rows=rows)
        return torch.cat((logprobs, values, RewardModelScorer(judge, rows)(episodes)[:, None]), dim=1)

    for rows in (1, 5):
        assert torch.allclose(asked(rows), asked(16), atol=1e-5)


def test_values_stand_at_actions_only():
    judge = scalar()
    _, _, episodes = sampled(toy.language_model())
    values = state_values(judge, episodes, rows=16)
    assert (values[episodes.action_mask_BT == 0] == 0).all()
    with torch.no_grad():
        everywhere = action_values(judge, episodes.tokens_BT, episodes.segments_BT)
    assert torch.equal(values, everywhere * episodes.action_mask_BT)
