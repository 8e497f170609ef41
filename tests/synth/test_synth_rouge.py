"""ROUGE-L: the paper's example, the slow twin, Chinese, and the pool against comparing with everything."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.synth.rouge import NoveltyPool, lcs_length, rouge_l, slow_lcs_length, tokens_of

sequences = st.lists(st.sampled_from("abcd"), max_size=80)


def test_rouge_l_of_lins_example() -> None:
    # Lin 2004, section 3.1: S2 scores 3/4, S3 2/4 against S1.
    first = tokens_of("police killed the gunman")
    assert rouge_l(first, tokens_of("police kill the gunman")) == 0.75
    assert rouge_l(first, tokens_of("the gunman kill police")) == 0.5


def test_chinese_characters_and_words_are_tokens_and_case_and_marks_do_not_count() -> None:
    assert tokens_of("把GPT-2翻译成 English。") == ("把", "gpt", "2", "翻", "译", "成", "english")
    assert tokens_of("Don't stop, Ünal!") == ("don", "t", "stop", "ünal")
    assert tokens_of("ひらがな ok") == ("ひ", "ら", "が", "な", "ok")
    assert rouge_l(tokens_of("写一首关于春天的诗"), tokens_of("写一首关于秋天的诗。")) == pytest.approx(8 / 9)


@settings(max_examples=80, deadline=None)
@given(sequences, sequences)
def test_the_bits_count_what_the_table_counts(first: list[str], second: list[str]) -> None:
    assert lcs_length(first, second) == slow_lcs_length(first, second)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "c", "天"]), max_size=8).map(" ".join), max_size=12),
    st.lists(st.sampled_from(["a", "b", "c", "天"]), max_size=8).map(" ".join),
    st.sampled_from([0.3, 0.5, 0.7, 1.0]),
)
def test_the_nearest_is_the_one_that_comparing_with_all_finds(pool: list[str], text: str, at_least: float) -> None:
    index = NoveltyPool()
    for each in pool:
        index.add(each)
    scores = [rouge_l(tokens_of(each), tokens_of(text)) for each in pool]
    best = max(scores, default=0.0)
    expected = (best, scores.index(best)) if best >= at_least else None
    assert index.nearest(text, at_least) == expected


def test_ten_thousand_instructions_are_searched_in_milliseconds() -> None:
    rng = np.random.default_rng(0)
    words = np.array([f"w{n}" for n in range(5000)])
    chances = 1 / np.arange(1, 5001)
    drawn = rng.choice(words, (10_000, 15), p=chances / chances.sum())
    index = NoveltyPool()
    for row in drawn:
        index.add(" ".join(row))
    began = time.perf_counter()
    for row in drawn[:50]:
        found = index.nearest(" ".join(row), 0.7)
        assert found is not None
        assert found[0] == 1.0
    assert (time.perf_counter() - began) / 50 < 0.1  # measured: 2 ms


def test_thresholds_outside_of_0_and_1_are_refused() -> None:
    with pytest.raises(ValueError, match="at_least"):
        NoveltyPool().nearest("a", 0.0)
