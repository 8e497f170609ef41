"""Splits by prompt: nothing of a training prompt is held out, in whatever form it comes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from feedback_samples import ORIGIN
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.data.feedback import prompt_of
from fledge.data.prompt_split import (
    family_text,
    prompt_text,
    require_disjoint,
    split_by_prompt,
    without_common_prefixes,
)
from fledge.errors import DataError
from fledge.types import ChatExample, Conversation, PairExample, PromptExample


def ask(*texts: str) -> Conversation:
    """User and assistant in turns."""
    roles = ("user", "assistant")
    return Conversation.of(*((roles[n % 2], text) for n, text in enumerate(texts)))  # type: ignore[misc]


def pair(prompt: Conversation, chosen: str = "yes") -> PairExample:
    return PairExample(prompt, chosen, "no", ORIGIN)


questions = st.text(st.sampled_from("ab c天"), min_size=1, max_size=4).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(questions, st.lists(questions, max_size=2)), min_size=1, max_size=30), st.randoms())
def test_c56_no_prompt_is_on_both_sides_whatever_the_order(asked: list[tuple[str, list[str]]], rng: object) -> None:
    examples = [
        pair(ask(first, *(t for more in rest for t in ("hm", more))), f"yes {n}")
        for n, (first, rest) in enumerate(asked)
    ]
    sides = split_by_prompt(examples, share=0.5)
    assert sorted(map(id, (*sides.train, *sides.validation))) == sorted(map(id, examples))
    families = [{family_text(prompt_of(e)) for e in side} for side in (sides.train, sides.validation)]
    assert not families[0] & families[1]
    assert len(families[0] | families[1]) == sides.num_families
    require_disjoint(sides.train, sides.validation)
    rng.shuffle(examples)  # type: ignore[attr-defined]
    again = split_by_prompt(examples, share=0.5)
    assert {e.chosen for e in again.validation} == {e.chosen for e in sides.validation}


def test_about_the_share_of_prompts_is_held_out_and_more_data_move_none() -> None:
    examples = [pair(ask(f"question {n}")) for n in range(4000)]
    sides = split_by_prompt(examples, share=0.1)
    assert 320 < len(sides.validation) < 480
    fewer = split_by_prompt(examples[:100], share=0.1)
    assert set(fewer.validation) <= set(sides.validation)


def test_case_white_space_and_unicode_form_do_not_make_another_prompt() -> None:
    assert prompt_text(ask("Why  is\nthis?")) == prompt_text(ask("why IS this?"))
    assert prompt_text(ask("cafe\u0301")) == prompt_text(ask("caf\u00e9"))
    assert prompt_text(ask("a", "b", "c")) != prompt_text(ask("a b c"))


def test_a_conversation_at_other_lengths_and_under_another_system_message_is_of_one_family() -> None:
    grown = ask("first", "answer", "second")
    under = Conversation((*Conversation.of(("system", "be kind")).messages, *grown.messages))
    assert family_text(ask("first")) == family_text(grown) == family_text(under)
    long = "x" * 200
    assert family_text(ask(long + "a")) == family_text(ask(long + "b"))


def test_held_out_prompts_that_were_trained_on_are_refused_by_name() -> None:
    trained = [ChatExample(ask("Q", "A"), ORIGIN)]
    with pytest.raises(DataError, match="has a prompt of the training data"):
        require_disjoint(trained, [PromptExample(ask(" q "), ORIGIN)])
    require_disjoint(trained, [PromptExample(ask("R"), ORIGIN)])


def kept(prompts: Sequence[Conversation], **options: int) -> list[int]:
    examples = [pair(prompt, f"{n}") for n, prompt in enumerate(prompts)]
    left, dropped = without_common_prefixes(examples, **options)
    assert dropped == len(examples) - len(left)
    return [int(example.chosen) for example in left]


def test_common_prefixes_and_longer_versions_of_a_conversation_leave_the_first() -> None:
    long = "w" * 250
    asked = [
        ask(long + " one"),
        ask("hi"),
        ask("hi there"),
        ask(long + " two"),
        ask("hi", "ho", "x"),
        ask("hi", "ha", "y"),
    ]
    assert kept(asked) == [0, 1, 2]
    assert kept(asked, per_family=2) == [0, 1, 2, 3, 4]
    assert kept(asked[::-1]) == [0, 2, 3]  # whichever comes first stays


def test_all_answers_of_a_kept_prompt_are_kept() -> None:
    assert kept([ask("a"), ask("b"), ask("A")]) == [0, 1, 2]


def test_shares_outside_of_0_and_1_are_refused() -> None:
    with pytest.raises(DataError, match="share"):
        split_by_prompt([pair(ask("a"))], share=1.0)
