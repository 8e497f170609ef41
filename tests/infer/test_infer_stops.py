"""Stop strings and half characters, against a slow twin that sees the whole text."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from fledge.infer.stops import AnswerText


class Table:
    """A tokenizer over a list of byte strings."""

    opening = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]


def cut_slowly(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop string: character by character, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def read(tokens: list[bytes], stops: list[str]) -> tuple[list[str], bool]:
    answer = AnswerText(Table(tokens), stops)
    pieces: list[str] = []
    for token_id in range(len(tokens)):
        piece, is_stopped = answer.push(token_id)
        pieces.append(piece)
        if is_stopped:
            return pieces, True
    return [*pieces, answer.finish()], False


def cuts(text: str, places: list[int]) -> list[bytes]:
    data = text.encode()
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


letters = st.text("ab中é🐦", max_size=12)


@settings(deadline=None)
@given(letters, st.lists(st.text("ab中é🐦", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 60)))
@example("aab", ["ab", "aab"], [])
@example("aabab", ["abab", "aabb"], [1, 2, 3])
def test_the_answer_is_cut_where_the_whole_text_says_however_it_is_tokenised(
    text: str, stops: list[str], places: list[int]
) -> None:
    pieces, is_stopped = read(cuts(text, places), stops)
    assert ("".join(pieces), is_stopped) == cut_slowly(text, stops)


@settings(deadline=None)
@given(letters, st.lists(st.text("ab中é🐦", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 60)))
def test_no_more_is_withheld_than_may_begin_a_stop_string(text: str, stops: list[str], places: list[int]) -> None:
    tokens = cuts(text, places)
    pieces, is_stopped = read(tokens, stops)
    for number in range(len(pieces) - 1 if not is_stopped else 0):
        so_far = b"".join(tokens[: number + 1]).decode(errors="ignore")
        held = so_far[len("".join(pieces[: number + 1])) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_half_a_character_is_told_as_invalid_only_at_the_end() -> None:
    assert read(["中".encode()[:2], "中".encode()[2:]], []) == (["", "中", ""], False)
    assert read([b"a", "中".encode()[:2]], []) == (["a", "", "\N{REPLACEMENT CHARACTER}"], False)
    assert read([b"a\xff", b"b"], []) == (["a\N{REPLACEMENT CHARACTER}", "b", ""], False)


def test_a_stop_string_may_be_completed_by_the_end_itself() -> None:
    answer = AnswerText(Table([b"a", b"\xe4"]), ["a\N{REPLACEMENT CHARACTER}"])
    assert [answer.push(0), answer.push(1)] == [("", False), ("", False)]
    assert answer.finish() == ""
