"""Bits per byte with scorers and tokenizers whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fledge.errors import DataError
from fledge.evals import bits_per_byte


class ByteTokenizer:
    """Every byte is a token; 256 ends a text."""

    end_of_text_id = 256

    def encode_batch(self, texts):
        return [list(text.encode("utf-8")) for text in texts]


class UniformScorer:
    """Every token has probability 1/`choices`; remembers what it was asked."""

    row_length = None

    def __init__(self, choices: int) -> None:
        self.choices = choices
        self.asked: list[list[int]] = []

    def logprobs(self, sequences, first=None):
        self.asked.extend(sequences)
        return [np.full(len(tokens) - 1, -math.log(self.choices)) for tokens in sequences]


def test_a_uniform_byte_model_costs_eight_bits_a_byte_and_eight_for_the_end():
    scorer = UniformScorer(256)
    metrics = bits_per_byte.evaluate(scorer, {"a": ["abc"]}, ByteTokenizer())
    assert metrics["bits_per_byte"] == pytest.approx(8 * 4 / 3)
    assert scorer.asked == [[256, 97, 98, 99, 256]]


def test_bytes_are_those_of_utf8_not_characters_or_tokens():
    metrics = bits_per_byte.evaluate(UniformScorer(2), {"a": ["é你😀"]}, ByteTokenizer())
    assert metrics["bytes"] == 2 + 3 + 4
    assert metrics["tokens"] == 10
    assert metrics["bits_per_byte"] == pytest.approx(10 / 9)


def test_totals_weigh_sources_by_their_bytes():
    metrics = bits_per_byte.evaluate(UniformScorer(2), {"a": ["x"], "b": ["y" * 9, "z" * 8]}, ByteTokenizer())
    assert metrics["bits_per_byte/a"] == pytest.approx(2.0)
    assert metrics["bits_per_byte/b"] == pytest.approx(19 / 17)
    assert metrics["bits_per_byte"] == pytest.approx(21 / 18)
    assert (metrics["documents/b"], metrics["bytes/b"], metrics["documents"]) == (2, 17, 3)
    assert "bits_per_byte/all_code" not in metrics


def test_code_is_reported_apart_and_left_out():
    documents = {"prose": ["xx"], "python": ["y"], "shell": ["zzz"]}
    metrics = bits_per_byte.evaluate(UniformScorer(2), documents, ByteTokenizer(), code_sources=["python", "shell"])
    assert metrics["bits_per_byte/without_code"] == pytest.approx(3 / 2)
    assert metrics["bits_per_byte/all_code"] == pytest.approx(6 / 4)
    assert metrics["bytes/all_code"] == 4
    with pytest.raises(ValueError, match="pyhton"):
        bits_per_byte.evaluate(UniformScorer(2), documents, ByteTokenizer(), code_sources=["pyhton"])


def test_limit_counts_documents_of_each_source_and_empty_texts_do_not_matter():
    metrics = bits_per_byte.evaluate(UniformScorer(2), {"a": ["x", "y", "z"], "b": [""]}, ByteTokenizer(), limit=2)
    assert metrics["documents"] == 2
    assert "bits_per_byte/b" not in metrics
    with pytest.raises(DataError, match="empty"):
        bits_per_byte.evaluate(UniformScorer(2), {"b": [""]}, ByteTokenizer())
