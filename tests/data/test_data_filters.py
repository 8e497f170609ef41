"""Filters and the split: the same text is the same document, whichever source it comes from."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.filters import FilterConfig, Sieve, document_key, example_text, select, side
from fledge.data.reading import Example
from fledge.errors import ConfigError
from fledge.types import ChatExample, Conversation, Provenance, TextExample

ORIGIN = Provenance("s", "1", "MIT")


def text(content: str, source: str = "s") -> TextExample:
    return TextExample(content, Provenance(source, "1", "MIT"))


def chat(*contents: str) -> ChatExample:
    roles = ("user", "assistant")
    return ChatExample(Conversation.of(*((roles[n % 2], c) for n, c in enumerate(contents))), ORIGIN)  # type: ignore[misc]


def sift(*examples: Example, config: FilterConfig | None = None) -> tuple[Sieve, list[tuple[str, str]]]:
    sieve = Sieve(config or FilterConfig(min_chars=1))
    return sieve, [(where, example_text(example)) for where, example in sieve.sift("s", examples)]


@given(st.text(min_size=1))
def test_the_key_ignores_white_space_and_normal_form_only(content: str) -> None:
    decomposed = unicodedata.normalize("NFD", content)
    assert document_key(f"  {decomposed}\n") == document_key(content.replace(" ", " \t "))
    assert document_key(content + "x") != document_key(content)


def test_a_text_falls_on_one_side_whichever_source_or_form_it_comes_in() -> None:
    contents = [f"line {n}\nanswer {n}" for n in range(400)]
    as_text = {c: w for w, c in sift(*map(text, contents))[1]}
    as_chat = {c: w for w, c in sift(*(chat(*c.split("\n")) for c in contents))[1]}
    assert as_text == as_chat
    assert 5 <= sum(where == "validation" for where in as_text.values()) <= 35


def test_a_smaller_share_holds_out_a_subset() -> None:
    keys = [document_key(str(n)) for n in range(2000)]
    small = {key for key in keys if side(key, 0.02) == "validation"}
    large = {key for key in keys if side(key, 0.1) == "validation"}
    assert small < large
    assert len(large) == pytest.approx(200, abs=50)


def test_duplicates_are_dropped_across_sources_and_counted() -> None:
    sieve = Sieve(FilterConfig(min_chars=1))
    assert len(list(sieve.sift("a", [text("the same"), text("another")]))) == 2
    assert not list(sieve.sift("b", [text(" the  same\n"), chat("the", "same")]))
    assert sieve.yields["b"].dropped == {"duplicate": 2}
    assert sieve.yields["a"].kept["train"] + sieve.yields["a"].kept["validation"] == 2


def test_garbled_short_and_undecodable_documents_are_dropped_with_their_reason() -> None:
    config = FilterConfig(min_chars=8)
    examples = [
        text("good enough text"),
        text("short"),
        text("bad \ufffd\ufffd \x01 text"),
        text("a\0 zero in here"),
        text("lone \ud800 surrogate"),
    ]
    sieve, kept = sift(*examples, config=config)
    assert [content for _, content in kept] == ["good enough text"]
    assert sieve.yields["s"].dropped == {
        "shorter than 8 characters": 1,
        "control or replacement characters": 1,
        "NUL or lone surrogate": 2,
    }
    assert sieve.yields["s"].read == 5


def test_a_chat_needs_an_exchange() -> None:
    sieve, kept = sift(chat("hello"), chat("hi", "hey"))
    assert len(kept) == 1
    assert sieve.yields["s"].dropped == {"fewer than 2 messages": 1}


def test_tabs_newlines_form_feeds_and_every_script_pass() -> None:
    _, kept = sift(text("tab\tnew\nfeed\f 三国演义 العربية 👩‍👩‍👧 e\u0301"))
    assert kept[0][1] == "tab\tnew\nfeed\f 三国演义 العربية 👩‍👩‍👧 é"


def test_a_long_document_is_cut_and_every_piece_is_split_on_its_own() -> None:
    content = "".join(f"Paragraph number {n} of a long book.\n\n" for n in range(2000))
    sieve, kept = sift(text(content), config=FilterConfig(max_chars=500))
    assert "".join(piece for _, piece in kept) == content
    assert max(len(piece) for _, piece in kept) <= 500
    assert {where for where, _ in kept} == {"train", "validation"}
    assert sieve.yields["s"].cut == len(kept) - 1


def test_the_validation_cap_holds_back_what_is_over_it_from_training_too() -> None:
    examples = [text(f"document {n}") for n in range(500)]
    sieve, kept = sift(*examples, config=FilterConfig(min_chars=1, validation_share=0.5, validation_cap=100))
    free = sift(*examples, config=FilterConfig(min_chars=1, validation_share=0.5))[1]
    assert {c for w, c in kept if w == "train"} == {c for w, c in free if w == "train"}
    assert 100 <= sieve.yields["s"].kept_bytes["validation"] < 115
    assert sieve.yields["s"].dropped["validation cap reached"] > 100


@pytest.mark.parametrize("buffer", [{}, {"buffer_size": 10}, {"buffer_chars": 60}])
def test_select_shuffles_by_seed_and_loses_nothing(buffer: dict[str, int]) -> None:
    examples = [text(f"document {n}") for n in range(300)]
    one, same, other = ([e.text for e in select(examples, "all", seed, **buffer)] for seed in (0, 0, 1))
    assert one == same != other
    assert sorted(one) == sorted(e.text for e in examples) != one
    sides = [{e.text for e in select(examples, split, 0)} for split in ("train", "validation")]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(one)
    assert sides[1] == {content for where, content in sift(*examples)[1] if where == "validation"}


def test_contradictory_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="validation_share"):
        FilterConfig(validation_share=0.0)
    with pytest.raises(ConfigError, match="min_chars <= max_chars"):
        FilterConfig(min_chars=10, max_chars=5)
