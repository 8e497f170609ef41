"""Kneser-Ney n-grams: known answers by hand, a naive twin, and what must hold for any counts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import CheckpointError, ConfigError, DataError
from fledge.models.ngram import FALLBACK_DISCOUNTS, NGram, NGramConfig, fit_orders


class NaiveKneserNey:
    """The slow twin: dictionaries, one probability at a time, straight from the formula."""

    def __init__(self, sequences: list[list[int]], vocab_size: int, order: int) -> None:
        self.vocab_size, self.order = vocab_size, order
        self.counts: list[Counter] = [Counter() for _ in range(order + 1)]
        for k in range(1, order + 1):
            raw: Counter = Counter()
            left: dict[tuple, set] = defaultdict(set)
            for number, sequence in enumerate(sequences):
                for end in range(max(1, k - 1), len(sequence)):
                    gram = tuple(sequence[end - k + 1 : end + 1])
                    raw[gram] += 1
                    start = end - k + 1
                    left[gram].add(sequence[start - 1] if start > 0 else ("start", number))
            self.counts[k] = raw if k == order else Counter({gram: len(seen) for gram, seen in left.items()})
        self.discounts = [None, *(self._discounts(self.counts[k]) for k in range(1, order + 1))]

    @staticmethod
    def _discounts(counts: Counter) -> list[float]:
        n = Counter(counts.values())
        if min(n[1], n[2], n[3], n[4]) == 0:
            return [0.0, *FALLBACK_DISCOUNTS]
        y = n[1] / (n[1] + 2 * n[2])
        found = [1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
        sound = all(0 < d <= c for c, d in enumerate(found, start=1))
        return [0.0, *(found if sound else FALLBACK_DISCOUNTS)]

    def prob(self, context: list[int], word: int) -> float:
        return self._prob(tuple(context)[-(self.order - 1) :] if self.order > 1 else (), word)

    def _prob(self, context: tuple, word: int) -> float:
        k = len(context) + 1
        lower = 1 / self.vocab_size if k == 1 else self._prob(context[1:], word)
        followers = {gram: count for gram, count in self.counts[k].items() if gram[:-1] == context}
        total = sum(followers.values())
        if total == 0:
            return lower
        discounts = self.discounts[k]
        count = followers.get((*context, word), 0)
        gamma = sum(discounts[min(c, 3)] for c in followers.values()) / total
        return (count - discounts[min(count, 3)]) / total + gamma * lower


def some_text(seed: int, num_sequences: int, length: int, vocab_size: int) -> list[list[int]]:
    """Sequences with repetition at every order, each opened and closed by token 0."""
    rng = np.random.default_rng(seed)
    words = rng.zipf(1.5, size=(num_sequences, length)) % (vocab_size - 1) + 1
    return [[0, *map(int, row), 0] for row in words]


corpora = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=6).filter(
    lambda sequences: any(len(sequence) > 1 for sequence in sequences)
)


def test_bigram_probabilities_equal_those_computed_by_hand():
    # One document "e a b a b e" and one "e a e" over e=0, a=1, b=2; c=3 is unseen.
    # Too few counts: discounts fall back.
    model = NGram.fit([[0, 1, 2, 1, 2, 0], [0, 1, 0]], NGramConfig(vocab_size=4, order=2))
    # Left neighbours: a after e, b; b after a; e after b, a -> a(a)=2, a(b)=1, a(e)=2, sum 5; one 1, two 2s.
    gamma_0 = (0.5 + 1.0 + 1.0) / 5
    unigram = {
        0: (2 - 1.0) / 5 + gamma_0 / 4,
        1: (2 - 1.0) / 5 + gamma_0 / 4,
        2: (1 - 0.5) / 5 + gamma_0 / 4,
        3: gamma_0 / 4,
    }
    # After a: b twice, e once. After e: a twice.
    gamma_a = (1.0 + 0.5) / 3
    expected_b_after_a = (2 - 1.0) / 3 + gamma_a * unigram[2]
    expected_c_after_e = (1.0 / 2) * unigram[3]
    logprobs = model.next_logprobs(torch.tensor([[0, 1]]))
    assert math.exp(logprobs[0, 1, 2]) == pytest.approx(expected_b_after_a, rel=1e-6)
    assert math.exp(logprobs[0, 0, 3]) == pytest.approx(expected_c_after_e, rel=1e-6)
    assert model.target_logprobs([0, 1, 2])[1] == pytest.approx(math.log(expected_b_after_a), rel=1e-12)


def test_discounts_equal_chen_and_goodman_for_known_counts_of_counts():
    # Unigrams with raw counts: ten once, four twice, two three times, one four times.
    words = [1] * 4 + [2] * 3 + [3] * 3 + [w for w in range(4, 8) for _ in range(2)] + list(range(8, 18))
    model = NGram.fit([[0, *words]], NGramConfig(vocab_size=20, order=1))
    y = 10 / 18
    assert model.discounts.tolist() == [pytest.approx([1 - 2 * y * 4 / 10, 2 - 3 * y * 2 / 4, 3 - 4 * y * 1 / 2])]


def test_counts_too_few_to_estimate_discounts_fall_back():
    model = NGram.fit([[0, 1, 2]], NGramConfig(vocab_size=3, order=2))
    assert model.discounts.tolist() == [list(FALLBACK_DISCOUNTS)] * 2


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_every_probability_equals_the_naive_twin(order):
    sequences = some_text(seed=1, num_sequences=30, length=25, vocab_size=40)
    model = NGram.fit(sequences, NGramConfig(vocab_size=50, order=order))
    twin = NaiveKneserNey(sequences, 50, order)
    assert model.discounts.tolist() == [pytest.approx(d[1:]) for d in twin.discounts[1:]]
    for sequence in (sequences[0], [0, 9, 3, 3, 1, 0, 2], [7, 7]):
        prob_1TV = model.next_logprobs(torch.tensor([sequence])).exp()
        for t in range(len(sequence)):
            expected = [twin.prob(sequence[: t + 1], word) for word in range(50)]
            assert prob_1TV[0, t].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_naive_comparison_covers_estimated_discounts_not_only_the_fallback():
    sequences = some_text(seed=1, num_sequences=30, length=25, vocab_size=40)
    model = NGram.fit(sequences, NGramConfig(vocab_size=50, order=3))
    assert list(FALLBACK_DISCOUNTS) not in model.discounts.tolist()


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(1, 5), st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_distributions_sum_to_one_and_are_positive_for_any_counts_and_any_context(sequences, order, context):
    model = NGram.fit(sequences, NGramConfig(vocab_size=7, order=order))
    prob_BTV = model.next_logprobs(torch.tensor([context])).double().exp()
    assert prob_BTV.sum(-1).flatten().tolist() == pytest.approx([1.0] * len(context), abs=1e-5)
    assert (prob_BTV > 0).all()


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(1, 5), st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_fast_target_path_equals_the_distribution_at_the_target(sequences, order, sequence):
    model = NGram.fit(sequences, NGramConfig(vocab_size=7, order=order))
    logprobs_TV = model.next_logprobs(torch.tensor([sequence]))[0]
    expected = [float(logprobs_TV[t, target]) for t, target in enumerate(sequence[1:])]
    assert model.target_logprobs(sequence).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_row_of_a_batch_knows_nothing_of_its_neighbours_or_of_what_follows():
    model = NGram.fit(some_text(2, 20, 20, 8), NGramConfig(vocab_size=8, order=4))
    rows = torch.tensor([[0, 3, 1, 2, 5], [5, 1, 1, 7, 2]])
    together = model.next_logprobs(rows)
    assert torch.equal(together[1:], model.next_logprobs(rows[1:]))
    assert torch.equal(together[:, :3], model.next_logprobs(rows[:, :3]))


def test_orders_counted_together_equal_those_counted_alone():
    sequences = some_text(3, 20, 30, 12)
    tokens = torch.tensor([sequences[4]])
    for order, model in fit_orders(sequences, [2, 3, 5], 12).items():
        alone = NGram.fit(sequences, NGramConfig(12, order))
        assert torch.equal(model.next_logprobs(tokens), alone.next_logprobs(tokens))


def test_a_longer_memory_lowers_the_loss_on_text_with_long_repetitions():
    rng = np.random.default_rng(0)
    phrases = rng.integers(1, 40, size=(20, 6))
    sequences = [[0, *map(int, phrases[rng.integers(20, size=8)].reshape(-1)), 0] for _ in range(60)]
    models = fit_orders(sequences[:50], [1, 2, 4], 40)
    loss = {k: -np.mean(np.concatenate([m.target_logprobs(s) for s in sequences[50:]])) for k, m in models.items()}
    assert loss[4] < loss[2] < loss[1]


def test_ids_of_a_large_vocabulary_do_not_overflow():
    vocab_size = 65_536
    high = vocab_size - 1
    sequences = [[high] * 3 + [high - 1, high - 2] * 10, [high - 2, high - 1, high]]
    model = NGram.fit(sequences, NGramConfig(vocab_size, order=6))
    twin = NaiveKneserNey(sequences, vocab_size, 6)
    query = [high, high, high - 1, high - 2, high - 1, high - 2, 5]
    expected = [math.log(twin.prob(query[:t], query[t])) for t in range(1, len(query))]
    assert model.target_logprobs(query).tolist() == pytest.approx(expected, rel=1e-9)


def test_tokens_from_unseen_padding_on_the_left_change_nothing():
    model = NGram.fit(some_text(4, 20, 20, 8), NGramConfig(vocab_size=10, order=3))
    plain = model.next_logprobs(torch.tensor([[0, 3, 2]]))
    padded = model.next_logprobs(torch.tensor([[9, 9, 0, 3, 2]]))
    assert torch.equal(padded[:, 2:], plain)


def test_an_untrained_model_is_uniform():
    model = NGram(NGramConfig(vocab_size=5, order=3))
    assert model.next_logprobs(torch.tensor([[1, 2]])).exp().flatten().tolist() == pytest.approx([0.2] * 10)
    assert model.target_logprobs([1, 2, 3]).tolist() == pytest.approx([math.log(0.2)] * 2)


def test_saved_tensors_give_back_the_same_model():
    sequences = some_text(5, 20, 20, 8)
    model = NGram.fit(sequences, NGramConfig(vocab_size=8, order=3))
    again = NGram(model.config)
    again.load_state_dict(model.state_dict())
    tokens = torch.tensor([sequences[0]])
    assert list(model.parameters()) == []
    assert torch.equal(again.next_logprobs(tokens), model.next_logprobs(tokens))
    assert np.array_equal(again.target_logprobs(sequences[1]), model.target_logprobs(sequences[1]))


def test_tensors_of_another_order_or_with_damaged_counts_are_refused():
    model = NGram.fit(some_text(6, 5, 9, 8), NGramConfig(vocab_size=8, order=3))
    tensors = model.state_dict()
    with pytest.raises(CheckpointError, match="2-gram"):
        NGram(NGramConfig(8, 2)).load_state_dict(tensors)
    for name, damaged in (
        ("keys_2", tensors["keys_2"].flip(0)),
        ("keys_3", tensors["keys_3"] + 10**9),
        ("counts_3", tensors["counts_3"][1:]),
        ("counts_2", -tensors["counts_2"]),
        ("discounts", tensors["discounts"] - 1),
        ("discounts", tensors["discounts"][1:]),
    ):
        with pytest.raises(CheckpointError, match="damaged"):
            NGram(model.config).load_state_dict({**tensors, name: damaged})


def test_one_token_sequences_predict_nothing_and_alone_are_refused():
    model = NGram.fit([[0, 1, 2], [3]], NGramConfig(vocab_size=4, order=2))
    same = NGram.fit([[0, 1, 2]], NGramConfig(vocab_size=4, order=2))
    assert torch.equal(model.next_logprobs(torch.tensor([[0, 3]])), same.next_logprobs(torch.tensor([[0, 3]])))
    assert len(model.target_logprobs([2])) == 0
    with pytest.raises(DataError, match="two tokens"):
        NGram.fit([[0], []], NGramConfig(vocab_size=4, order=2))


def test_ids_outside_the_vocabulary_and_senseless_configs_are_refused():
    with pytest.raises(DataError, match="lie in 0"):
        NGram.fit([[0, 4]], NGramConfig(vocab_size=4, order=2))
    model = NGram.fit([[0, 3]], NGramConfig(vocab_size=4, order=2))
    with pytest.raises(ValueError, match="lie in 0"):
        model.next_logprobs(torch.tensor([[4]]))
    with pytest.raises(ConfigError, match="order"):
        NGramConfig(vocab_size=4, order=0)
    with pytest.raises(ConfigError, match="vocab_size"):
        NGramConfig(vocab_size=0)
