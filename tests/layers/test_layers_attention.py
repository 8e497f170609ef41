"""Contexts against a slow twin that computes every score in the open."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fledge.errors import UserError
from fledge.layers.attention import (
    BANDED_FROM_WINDOWS,
    Context,
    RowContext,
    SegmentContext,
    drop_attention,
    require_fit,
)

NUM_POSITIONS = 23


def slow_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    segments_BT: Tensor,
    *,
    window: int | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One softmax a query, over the keys it may see."""
    num_rows, num_positions, num_heads, width = q_BTHK.shape
    group = num_heads // k_BTGK.shape[2]
    scale = width**-0.5 if scale is None else scale
    y_BTHK = torch.zeros_like(q_BTHK)
    for row, t, head in itertools.product(range(num_rows), range(num_positions), range(num_heads)):
        seen = [
            s for s in range(t + 1) if segments_BT[row, s] == segments_BT[row, t] and (window is None or t - s < window)
        ]
        scores = k_BTGK[row, seen, head // group] @ q_BTHK[row, t, head] * scale
        if bias is not None:
            scores = scores + bias.expand(num_rows, num_heads, num_positions, num_positions)[row, head, t, seen]
        y_BTHK[row, t, head] = scores.softmax(0) @ v_BTGK[row, seen, head // group]
    return y_BTHK


def random_heads(num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_heads)
    counts = (num_heads, num_kv_heads, num_kv_heads)
    q, k, v = (torch.randn(2, NUM_POSITIONS, count, 6, generator=generator) for count in counts)
    return q, k, v


def packed_segments() -> Tensor:
    """Left padding, a document of one token, a long one; and a row of three documents and padding on the right."""
    return torch.tensor([[0] * 4 + [1] + [2] * 18, [1] * 7 + [2] * 5 + [3] * 8 + [0] * 3], dtype=torch.int32)


def contexts() -> list[tuple[Context, Tensor]]:
    tokens_BT = torch.zeros(2, NUM_POSITIONS, dtype=torch.int64)
    segments_BT = packed_segments()
    return [(RowContext(tokens_BT), torch.ones_like(segments_BT)), (SegmentContext(segments_BT), segments_BT)]


@pytest.mark.parametrize("window", [None, 1, 2, 5, 7, 8, 22, 23, 40])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_attention_equals_the_slow_twin_at_every_window(window: int | None, which: int, heads: tuple[int, int]) -> None:
    context, segments_BT = contexts()[which]
    q, k, v = random_heads(*heads)
    expected = slow_attention(q, k, v, segments_BT, window=window, scale=0.3)
    found = context.attend(0, q, k, v, window=window, scale=0.3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("which", [0, 1])
def test_a_bias_is_added_to_the_scores(window: int | None, which: int) -> None:
    context, segments_BT = contexts()[which]
    q, k, v = random_heads(4, 2)
    bias = torch.randn(4, NUM_POSITIONS, NUM_POSITIONS, generator=torch.Generator().manual_seed(9))
    expected = slow_attention(q, k, v, segments_BT, window=window, bias=bias[None])
    found = context.attend(0, q, k, v, window=window, bias=bias)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_of_the_banded_path_equal_those_of_its_masked_dense_twin(which: int) -> None:
    context, _ = contexts()[which]
    window = 4
    assert window * BANDED_FROM_WINDOWS <= NUM_POSITIONS
    weights = torch.randn(2, NUM_POSITIONS, 4, 6, generator=torch.Generator().manual_seed(3))
    gradients = []
    for dense in (False, True):
        q, k, v = (x.requires_grad_() for x in random_heads(4, 2))
        # A bias of zeros changes nothing but takes the masked dense path.
        bias = torch.zeros(1, 1, 1) if dense else None
        (context.attend(0, q, k, v, window=window, bias=bias) * weights).sum().backward()
        gradients.append((q.grad, k.grad, v.grad))
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_positions_start_anew_in_every_document() -> None:
    assert SegmentContext(packed_segments()).positions_BT[1].tolist() == [
        *range(7),
        *range(5),
        *range(8),
        *range(3),
    ]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_earlier_tokens_never_come_from_another_document(steps: int) -> None:
    segments_BT = packed_segments()
    tokens_BT = torch.arange(2 * NUM_POSITIONS).view(2, NUM_POSITIONS)
    found_BT = SegmentContext(segments_BT).earlier(tokens_BT, steps, -7)
    for row, t in itertools.product(range(2), range(NUM_POSITIONS)):
        has_one = t >= steps and segments_BT[row, t - steps] == segments_BT[row, t]
        assert found_BT[row, t] == (tokens_BT[row, t - steps] if has_one else -7)
    expected_BT = torch.cat((torch.full((2, steps), -7), tokens_BT[:, :-steps]), dim=1)
    assert torch.equal(RowContext(tokens_BT).earlier(tokens_BT, steps, -7), expected_BT)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("window", [None, 2, 9])
def test_dropped_attention_keeps_its_expectation_and_leaves_the_context_alone(which: int, window: int | None) -> None:
    context, _ = contexts()[which]
    q, k, v = random_heads(4, 2)
    plain = context.attend(0, q, k, v, window=window)
    dropped = drop_attention(context, 0.5)
    torch.manual_seed(0)
    samples = torch.stack([dropped.attend(0, q, k, v, window=window) for _ in range(600)])
    assert not torch.equal(samples[0], samples[1])
    torch.testing.assert_close(samples.mean(0), plain, atol=0.35, rtol=0.0)
    assert (samples.mean(0) - plain).abs().mean() < 0.04
    assert torch.equal(context.attend(0, q, k, v, window=window), plain)
    assert drop_attention(context, 0.0) is context


class FakeCache:
    """Knows what every context knows, but not how to drop."""

    positions_BT = torch.zeros(1, 1, dtype=torch.int64)

    def attend(self, site: int, q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        return q

    def earlier(self, tokens_BT: Tensor, steps: int, fill: int) -> Tensor:
        return tokens_BT


def test_a_cache_in_training_mode_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match=r"FakeCache cannot drop attention weights: call model.eval"):
        drop_attention(FakeCache(), 0.1)


def test_a_document_that_is_too_long_is_refused_with_both_lengths() -> None:
    with pytest.raises(UserError, match="23 tokens does not fit a model of 22 positions"):
        require_fit(contexts()[0][0], 22)


def test_a_packed_row_may_be_longer_than_the_model_if_no_document_is() -> None:
    context, _ = contexts()[1]
    require_fit(context, 18)
    require_fit(context, None)
    with pytest.raises(UserError, match="18 tokens does not fit a model of 17 positions"):
        require_fit(context, 17)
