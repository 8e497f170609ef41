"""Scorers against the distributions they shortcut, and windows against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fledge.evals.scorer import CausalScorer, NGramScorer, windows_of
from fledge.layers.attention import RowContext
from fledge.models.ngram import NGram, NGramConfig

VOCAB = 11


class TinyCausal(nn.Module):
    """One causal attention layer over embeddings and positions: enough to notice leaks, padding and shifts."""

    vocab_size = VOCAB

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tokens = nn.Embedding.from_pretrained(torch.randn(VOCAB, 8, generator=generator), freeze=False)
        self.positions = nn.Embedding.from_pretrained(torch.randn(64, 8, generator=generator), freeze=False)
        self.dropout = nn.Dropout(0.5)

    def embed(self, tokens_BT, context):
        return self.dropout(self.tokens(tokens_BT) + self.positions(context.positions_BT))

    def hidden(self, x_BTD, context):
        x_BT1D = x_BTD[:, :, None]
        return x_BTD + context.attend(0, x_BT1D, x_BT1D, x_BT1D)[:, :, 0]

    def unembed(self, x_BTD):
        return x_BTD @ self.tokens.weight.T

    @torch.no_grad()
    def next_logprobs(self, tokens_BT):
        context = RowContext(tokens_BT)
        return self.unembed(self.hidden(self.embed(tokens_BT, context), context)).log_softmax(-1)


def by_hand(model, tokens, row_length):
    """The slow twin: for every token the whole distribution after its window's earlier tokens."""
    stride = max(1, row_length // 2)
    found = []
    for target in range(1, len(tokens)):
        start = 0
        while start + row_length < target:
            start += stride
        logprobs = model.next_logprobs(torch.tensor([tokens[start:target]]))
        found.append(float(logprobs[0, -1, tokens[target]]))
    return found


def some_sequences(seed, lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, size=length).tolist() for length in lengths]


@pytest.mark.parametrize("row_length", [1, 4, 5, 30])
def test_causal_scores_equal_the_distribution_at_every_token_in_every_window(row_length):
    model = TinyCausal().eval()
    sequences = some_sequences(0, [2, 17, 5, 1, 9, 26])
    scores = CausalScorer(model, row_length=row_length, pad_id=1).logprobs(sequences)
    for tokens, found in zip(sequences, scores, strict=True):
        assert found.tolist() == pytest.approx(by_hand(model, tokens, row_length), abs=1e-5)


def test_scores_do_not_depend_on_batching_padding_or_order():
    model = TinyCausal().eval()
    sequences = some_sequences(1, [30, 3, 8, 8, 21, 2])
    alone = [CausalScorer(model, row_length=10, pad_id=0).logprobs([s])[0] for s in sequences]
    for batch_tokens, pad_id in ((1, 0), (25, 7), (4096, 3)):
        scorer = CausalScorer(model, row_length=10, pad_id=pad_id, batch_tokens=batch_tokens)
        for found, expected in zip(scorer.logprobs(sequences), alone, strict=True):
            assert found == pytest.approx(expected, abs=1e-5)


def test_a_head_computed_in_small_pieces_gives_the_same_scores(monkeypatch):
    model = TinyCausal().eval()
    sequences = some_sequences(2, [12, 30])
    whole = CausalScorer(model, row_length=16, pad_id=0).logprobs(sequences)
    monkeypatch.setattr("fledge.evals.scorer._LOGITS_AT_ONCE", 3 * VOCAB)
    pieces = CausalScorer(model, row_length=16, pad_id=0).logprobs(sequences)
    for a, b in zip(whole, pieces, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("row_length", [4, 16, 64])
def test_scoring_from_a_later_token_is_a_slice_of_scoring_all(row_length):
    model = TinyCausal().eval()
    ngram = NGram.fit(some_sequences(9, [40] * 5), NGramConfig(VOCAB, 3))
    sequences = some_sequences(3, [12, 30, 4])
    first = [5, 29, 4]
    for scorer in (CausalScorer(model, row_length=row_length, pad_id=0), NGramScorer(ngram)):
        for whole, part, start in zip(
            scorer.logprobs(sequences), scorer.logprobs(sequences, first), first, strict=True
        ):
            assert part == pytest.approx(whole[start - 1 :], abs=1e-5)


def test_dropout_is_off_while_scoring_and_the_mode_is_given_back():
    model = TinyCausal().train()
    scorer = CausalScorer(model, row_length=8, pad_id=0)
    sequences = some_sequences(4, [9, 9])
    again = scorer.logprobs(sequences)
    assert all(np.array_equal(a, b) for a, b in zip(scorer.logprobs(sequences), again, strict=True))
    assert model.training


def test_ngram_scores_equal_the_distribution_at_every_token():
    ngram = NGram.fit(some_sequences(5, [40] * 5), NGramConfig(VOCAB, 3))
    tokens = some_sequences(6, [50])[0]
    logprobs = ngram.next_logprobs(torch.tensor([tokens]))[0]
    expected = [float(logprobs[t, target]) for t, target in enumerate(tokens[1:])]
    assert NGramScorer(ngram).logprobs([tokens])[0].tolist() == pytest.approx(expected, abs=1e-5)


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_windows_predict_every_wanted_token_once_with_half_a_row_before_it(num_tokens, row_length, data):
    first = data.draw(st.integers(1, num_tokens))
    predicted = []
    for window in windows_of(0, num_tokens, first, row_length):
        assert window.stop - window.start - 1 <= row_length
        for token in range(window.first, window.stop):
            assert token - window.start >= min(token, max(1, row_length // 2))
            predicted.append(token)
    assert predicted == list(range(first, num_tokens))


def test_senseless_requests_are_refused():
    scorer = CausalScorer(TinyCausal(), row_length=8, pad_id=0)
    with pytest.raises(ValueError, match="from token 0"):
        scorer.logprobs([[1, 2]], [0])
    with pytest.raises(ValueError, match="from token 3"):
        scorer.logprobs([[1, 2]], [3])
    with pytest.raises(ValueError, match="empty"):
        scorer.logprobs([[]])
    with pytest.raises(ValueError, match="row_length"):
        CausalScorer(TinyCausal(), row_length=0, pad_id=0)
