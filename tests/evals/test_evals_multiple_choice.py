"""Multiple choice: boundaries, shots, truncation and scores with fakes whose likelihoods are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from fledge.errors import DataError
from fledge.evals import multiple_choice
from fledge.evals.multiple_choice import _item, _tokenize, render


@dataclass(frozen=True)
class Q:
    question: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""


class PairTokenizer:
    """Bytes, but for one merge: `merged` (two characters) is a single token, 300. 256 ends a text."""

    end_of_text_id = 256

    def __init__(self, merged: str = "\x00\x01") -> None:
        self.merged = merged.encode()

    def encode(self, text):
        ids, data = [], text.encode("utf-8")
        while data:
            step = 2 if data.startswith(self.merged) else 1
            ids.append(300 if step == 2 else data[0])
            data = data[step:]
        return ids

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


class Oracle:
    """Likes the letters of `liked`: each costs 1 nat less than other bytes. Remembers the texts it read."""

    def __init__(self, liked: str = "", row_length: int | None = None) -> None:
        self.liked = set(liked.encode())
        self.row_length = row_length
        self.asked: list[tuple[list[int], int]] = []

    def logprobs(self, sequences, first=None):
        self.asked.extend((list(tokens), start) for tokens, start in zip(sequences, first, strict=True))
        return [
            np.asarray([-1.0 if token in self.liked else -2.0 for token in tokens[start:]])
            for tokens, start in zip(sequences, first, strict=True)
        ]


def questions(num, answer=1):
    return [Q(f"number {n}?", ("aaaa", "zzzz"), answer) for n in range(num)]


def ask(scorer, items, shots=(), num_shots=0, **options):
    return multiple_choice.evaluate(scorer, items, shots, PairTokenizer(), num_shots=num_shots, seed=0, **options)


def test_the_likeliest_choice_is_the_answer():
    assert ask(Oracle(liked="z"), questions(8))["accuracy"] == 1.0
    assert ask(Oracle(liked="a"), questions(8))["accuracy"] == 0.0


def test_summed_scores_favour_short_choices_and_scores_per_byte_do_not():
    items = [Q("?", ("zz", "aaaaaaaa"), 1)] * 4  # by sum -4 - 2 beats -8 - 2, by byte -3 loses to -10/8
    metrics = ask(Oracle(liked="a"), items)
    assert (metrics["accuracy"], metrics["accuracy_per_byte"]) == (0.0, 1.0)


def test_a_scorer_that_knows_nothing_is_exactly_at_chance():
    items = [*questions(3), Q("which?", ("abcd", "efgh", "ijkl", "mnop"), 2)]
    metrics = ask(Oracle(), items)
    assert metrics["chance"] == pytest.approx((3 * 0.5 + 0.25) / 4)
    assert metrics["accuracy"] == pytest.approx(metrics["chance"])
    assert metrics["accuracy_low"] <= metrics["chance"] <= metrics["accuracy_high"]


def test_the_prompt_reads_as_documented():
    scorer = Oracle()
    shot = Q("one? ", ("yes", "no"), 1)
    ask(scorer, [Q("two?", ("x", "y"), 0)], [shot], num_shots=1)
    tokens, first = scorer.asked[1]
    assert tokens[0] == 256
    assert bytes(tokens[1:]) == b"Question: one?\nAnswer: no\n\nQuestion: two?\nAnswer: y"
    assert bytes(tokens[first:]) == b" y"


def test_a_passage_stands_before_its_question():
    assert render(Q("who?", ("x", "y"), 0, "It was Ann. ")) == "It was Ann.\nQuestion: who?\nAnswer:"


def test_a_token_across_the_boundary_charges_every_choice_for_the_same_bytes():
    tokenizer = PairTokenizer(merged=": ")  # the colon of the context and the space of the choice are one token
    question = Q("?", ("a", "b"), 0)
    context = render(question)
    (item,) = _tokenize([context], [question], tokenizer, None)
    assert item.sequences[0] == (256, *tokenizer.encode(context + " a"))
    assert [sequence[item.first :] for sequence in item.sequences] == [(300, ord("a")), (300, ord("b"))]


def test_a_merge_in_one_choice_only_moves_the_boundary_for_all():
    # The context ends in token 7; choice 0 continues it, in choice 1 it is merged with what follows into token 9.
    item = _item([5, 6, 7], [[5, 6, 7, 1], [5, 6, 9]], 0, None)
    assert item.first == 3
    assert [sequence[item.first :] for sequence in item.sequences] == [(7, 1), (9,)]


def test_one_choice_that_begins_another_is_still_scored():
    item = _item([5, 6], [[5, 6, 1], [5, 6, 1, 2]], 0, None)
    assert [sequence[item.first :] for sequence in item.sequences] == [(1,), (1, 2)]


@pytest.mark.parametrize("row_length", [3, 4, 5, 6, 9])
def test_contexts_that_exceed_the_row_lose_their_left_for_all_choices_alike(row_length):
    encoded = [[1, 2, 3, 4, 5, 10], [1, 2, 3, 4, 5, 11, 12]]
    item = _item([1, 2, 3, 4, 5], encoded, 0, row_length)
    kept = min(5, row_length - 2)
    assert item.sequences == ((0, *range(6 - kept, 6), 10), (0, *range(6 - kept, 6), 11, 12))
    assert item.first == 1 + kept
    assert item.is_truncated == (kept < 5)
    assert max(len(sequence) - 1 for sequence in item.sequences) <= row_length


def test_a_choice_longer_than_the_row_is_kept_whole():
    item = _item([1, 2], [[1, 2, 3, 4, 5, 6], [1, 2, 7]], 0, 3)
    assert item.sequences == ((0, 3, 4, 5, 6), (0, 7))
    assert item.first == 1


def test_truncated_contexts_are_counted():
    assert ask(Oracle(row_length=10), questions(4))["share_truncated"] == 1.0
    assert ask(Oracle(row_length=1000), questions(4))["share_truncated"] == 0.0


def test_shots_are_drawn_anew_for_each_question_and_never_ask_it():
    scorer = Oracle()
    pool = [Q(f"shot {n}?", ("yes", "no"), 0) for n in range(20)]
    items = [Q(f"shot {n}?", ("yes", "no"), 0) for n in range(20)]
    ask(scorer, items, pool, num_shots=3)
    texts = [bytes(tokens[1:]).decode() for tokens, _ in scorer.asked[::2]]
    for number, text in enumerate(texts):
        assert text.count("Question:") == 4
        assert text.count(f"shot {number}?") == 1
    assert len({text.split("\n\n")[0] for text in texts}) > 5


def test_fewer_shots_are_the_first_of_more():
    pool = [Q(f"shot {n}?", ("yes", "no"), 0) for n in range(20)]
    one, three = Oracle(), Oracle()
    ask(one, questions(3), pool, num_shots=1)
    ask(three, questions(3), pool, num_shots=3)
    for (a, _), (b, _) in zip(one.asked, three.asked, strict=True):
        assert bytes(b[1:]).split(b"\n\n")[0] == bytes(a[1:]).split(b"\n\n")[0]


def test_limit_draws_the_same_questions_whatever_the_number_of_shots():
    pool = [Q("shot?", ("yes", "no"), 0)]
    zero, one = Oracle(), Oracle()
    metrics = ask(zero, questions(50), limit=5)
    ask(one, questions(50), pool, num_shots=1, limit=5)
    assert metrics["questions"] == 5
    asked = [[bytes(t[1:]).split(b"\n\n")[-1] for t, _ in scorer.asked] for scorer in (zero, one)]
    assert asked[0] == asked[1]


def test_too_few_examples_or_no_questions_are_refused():
    with pytest.raises(DataError, match="2 shots"):
        ask(Oracle(), questions(2), [Q("shot?", ("y", "n"), 0), questions(1)[0]], num_shots=2)
    with pytest.raises(DataError, match="no questions"):
        ask(Oracle(), [])
