"""Passes without padding say what passes over whole rows say, and cost less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fledge.layers.attention import SegmentContext
from fledge.models.pocket import Pocket, PocketConfig
from fledge.models.scalar import ScalarModel
from fledge.objectives.clipped_policy import ActionSpace, action_logprobs, token_logprobs
from fledge.objectives.completions import completion_logprobs
from fledge.objectives.padding import PASS_POSITIONS, groups_of
from fledge.objectives.scores import read_scores, token_scores

PROMPT, RESPONSE, VOCAB, PAD = 6, 10, 30, 1
SPACE = ActionSpace(RESPONSE, banned_ids=(PAD,))


def model() -> Pocket:
    """It looks at the tokens before, too: where a row begins matters to its tables."""
    pocket = Pocket(PocketConfig(VOCAB, 16, 2, 2, table_rows=64))
    pocket.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in pocket.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return pocket.eval()


def rows_of(lengths: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, segments, action mask): prompts of the first lengths stand on the left of answers of the second ones."""
    shape = (len(lengths), PROMPT + RESPONSE)
    tokens = torch.full(shape, PAD)
    segments, mask = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    generator = torch.Generator().manual_seed(2)
    for row, (prompt, answer) in enumerate(lengths):
        own = slice(PROMPT - prompt, PROMPT + answer)
        tokens[row, own] = torch.randint(2, VOCAB, (prompt + answer,), generator=generator)
        segments[row, own] = 1
        mask[row, PROMPT : PROMPT + answer] = 1
    return tokens, segments, mask


LENGTHS = st.lists(st.tuples(st.integers(1, PROMPT), st.integers(1, RESPONSE)), min_size=1, max_size=20)


@pytest.fixture(autouse=True)
def passes_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small batches are cut, too."""
    monkeypatch.setitem(PASS_POSITIONS, "cpu", 1)


UNEVEN = [(1 + 5 * row % PROMPT, 1 + 7 * row % RESPONSE) for row in range(19)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LENGTHS)
def test_every_real_position_is_in_one_group_and_groups_are_as_wide_as_their_longest_row(
    lengths: list[tuple[int, int]],
) -> None:
    _, segments, _ = rows_of(lengths)
    met = torch.zeros_like(segments)
    for group in groups_of(segments):
        assert group.inside_bL.any(dim=0).all()
        for row, columns, inside in zip(*group, strict=True):
            met[row, columns[inside]] += 1
    assert torch.equal(met, (segments > 0).int())


def test_rows_of_padding_alone_are_left_out_unless_there_is_nothing_else() -> None:
    _, segments, _ = rows_of(UNEVEN)
    segments[[0, 7]] = 0
    assert sorted(int(row) for group in groups_of(segments) for row in group.rows_b) == [*range(1, 7), *range(8, 19)]
    (nothing,) = groups_of(torch.zeros(3, 5, dtype=torch.int32))
    assert (nothing.columns_bL.shape, bool(nothing.inside_bL.any())) == ((3, 1), False)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LENGTHS)
def test_log_probabilities_of_actions_are_those_of_whole_rows(lengths: list[tuple[int, int]]) -> None:
    tokens, segments, mask = rows_of(lengths)
    policy = model()
    whole = action_logprobs(policy, policy.embed(tokens, SegmentContext(segments)), tokens, segments, SPACE)
    found = token_logprobs(policy, tokens, segments, SPACE)
    torch.testing.assert_close(found[mask > 0], whole[mask > 0], atol=1e-5, rtol=1e-5)
    assert not found[mask == 0].any()


def gradients(of: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    of.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone() for p in of.parameters()]


def test_gradients_are_those_of_whole_rows() -> None:
    tokens, segments, mask = rows_of(UNEVEN)
    policy, weights = model(), torch.randn(mask.shape, generator=torch.Generator().manual_seed(3)) * mask
    whole = action_logprobs(policy, policy.embed(tokens, SegmentContext(segments)), tokens, segments, SPACE)
    expected = gradients(policy, (torch.where(mask > 0, whole, 0.0) * weights).sum())
    found = gradients(policy, (token_logprobs(policy, tokens, segments, SPACE) * weights).sum())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_scores_and_their_gradients_are_those_of_whole_rows() -> None:
    tokens, segments, _ = rows_of(UNEVEN)
    judge = ScalarModel.from_trunk("pocket", model(), generator=torch.Generator().manual_seed(4)).eval()
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3)) * (segments > 0)
    whole = read_scores(judge, judge.embed(tokens, SegmentContext(segments)), segments)
    found = token_scores(judge, tokens, segments)
    torch.testing.assert_close(found[segments > 0], whole[segments > 0], atol=1e-5, rtol=1e-5)
    assert not found[segments == 0].any()
    expected = gradients(judge, (whole * weights).sum())
    torch.testing.assert_close(gradients(judge, (found * weights).sum()), expected, atol=1e-4, rtol=1e-4)


def test_a_completion_says_the_same_alone_and_among_others() -> None:
    tokens, segments, mask = rows_of(UNEVEN)
    policy = model()
    together = completion_logprobs(policy, tokens, segments, mask)
    alone = [completion_logprobs(policy, *(x[row : row + 1] for x in (tokens, segments, mask))) for row in range(19)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-5)


def test_a_compiled_region_is_given_whole_rows() -> None:
    tokens, segments, _ = rows_of(UNEVEN)
    policy, shapes = model(), []

    def region(*args: object) -> Tensor:
        shapes.append(args[2].shape)  # type: ignore[attr-defined]
        return action_logprobs(*args)  # type: ignore[arg-type]

    token_logprobs(policy, tokens, segments, SPACE, region)
    assert shapes == [tokens.shape]


def test_half_and_more_of_the_positions_are_spared_where_lengths_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    _, segments, _ = rows_of([(2, 1)] * 15 + [(PROMPT, RESPONSE)])
    run = sum(group.columns_bL.numel() for group in groups_of(segments))
    assert run == 12 * 3 + 4 * 16  # of 16 x 16; the long row takes the three beside it along
    monkeypatch.setitem(PASS_POSITIONS, "cpu", 60)  # a second group spares 104 positions, a third 26
    assert [len(group.rows_b) for group in groups_of(segments)] == [8, 8]
    monkeypatch.setitem(PASS_POSITIONS, "cpu", 200)
    assert [len(group.rows_b) for group in groups_of(segments)] == [16]


@pytest.mark.parametrize("num_rows", [1, 3, 4, 8, 64])
def test_rows_of_one_length_are_one_group(num_rows: int) -> None:
    _, segments, _ = rows_of([(PROMPT, RESPONSE)] * num_rows)
    assert [group.columns_bL.shape for group in groups_of(segments)] == [(num_rows, 16)]
