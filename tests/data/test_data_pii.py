"""Personal data: what is found, what is left alone, and that every place of an example is looked at."""

from __future__ import annotations

import pytest
from feedback_samples import HOLDS, ORIGIN
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.data.feedback import FeedbackExample
from fledge.data.pii import Taken, find, passes_luhn, redact, redacted, texts_of, without_pii
from fledge.types import (
    CallPart,
    ChatExample,
    Conversation,
    Message,
    PairExample,
    PromptExample,
    Ranking,
    RatedExample,
    StepsExample,
    TextExample,
    UnpairedExample,
)

FOUND = {
    "email": ["ann.lee+news@mail.example.org", "a@b.co", "写信到 liming@example.cn。", "<x_y@z.io>"],
    "card": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "card:6011111111111117."],
    "ip": ["8.8.8.8", "at 93.184.216.34:80", "2606:4700:4700::1111"],
    "phone": [
        "+1 415-555-2671",
        "(415) 555-2671",
        "415-555-2671",
        "+44 20 7946 0958",
        "13812345678",
        "010-62345678",
        "138 1234 5678",
    ],
}
LEFT = [
    "4111 1111 1111 1112",  # wrong check digit
    "0000 0000 0000 0000",
    "in 1999-2004 and 12.5.2020, 3.14159265, 1,000,000 and 2020-01-02",
    "version 1.2.3.4.5, 127.0.0.1 and 192.168.0.1 and 999.1.1.1",
    "12:30:45 and std::vector and a::b",
    "user@host and @name and a@b.c",
    "2 + 2 = 4; 100 200 300; 555-2671",
    "ISBN 978-3-16-148410-0",
    "1+234-567-8900=",
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, some in FOUND.items() for text in some])
def test_personal_data_are_found_once_and_as_what_they_are(kind: str, text: str) -> None:
    assert [one.kind for one in find(f"well, {text} then")] == [kind]


@pytest.mark.parametrize("text", LEFT)
def test_what_only_looks_like_personal_data_is_left(text: str) -> None:
    assert find(text) == []


def test_redaction_puts_the_kind_in_the_place_of_the_finding() -> None:
    text, findings = redact("Mail a@b.co or call 415-555-2671!")
    assert text == "Mail [email] or call [phone]!"
    assert len(findings) == 2
    assert redact(text) == (text, [])


def test_luhn_by_its_published_example() -> None:
    # 7992739871 with check digit 3 is the example of the standard; it is too short for a card.
    assert not passes_luhn("79927398713")
    assert passes_luhn("4539 1488 0343 6467")
    assert not passes_luhn("8273 1232 7352 0569")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=12, max_size=18).filter(lambda d: len(set(d)) > 1), st.integers(1, 9))
def test_exactly_one_check_digit_passes_and_any_single_slip_is_caught(digits: list[int], slip: int) -> None:
    numbers = ["".join(map(str, [*digits, check])) for check in range(10)]
    right = [number for number in numbers if passes_luhn(number)]
    assert len(right) == 1
    wrong = [right[0][:i] + str((int(right[0][i]) + slip) % 10) + right[0][i + 1 :] for i in range(len(right[0]))]
    assert not any(map(passes_luhn, wrong))


PROMPT = Conversation.of(("user", "Q"))
EXAMPLES: list[FeedbackExample] = [
    TextExample("to a@b.co", ORIGIN),
    ChatExample(PROMPT.then("assistant", "a@b.co"), ORIGIN),
    ChatExample(Conversation((Message("assistant", (CallPart("f", '{"to": "a@b.co"}'),)),)), ORIGIN),
    PromptExample(Conversation.of(("user", "a@b.co")), ORIGIN),
    PairExample(PROMPT, "fine", "a@b.co", ORIGIN),
    PairExample(PROMPT, "a@b.co", "fine", ORIGIN),
    UnpairedExample(PROMPT, "a@b.co", True, ORIGIN),
    RatedExample(PROMPT, "a@b.co", 7, ORIGIN),
    StepsExample(PROMPT, ("one", "a@b.co"), (True, True), ORIGIN),
    Ranking(PROMPT, ("x", "a@b.co"), (1, 2), (True, True), ("m", "m"), ORIGIN),
]


def test_every_place_of_every_kind_of_example_is_looked_at_and_counted() -> None:
    clean = PairExample(PROMPT, "yes", "no", ORIGIN)
    taken = Taken()
    assert list(without_pii([*EXAMPLES, clean], taken)) == [clean]
    assert taken.to_json() == {"seen": 11, "examples": 10, "findings": {"email": 10}}
    taken = Taken()
    cleaned = list(redacted([*EXAMPLES, clean], taken))
    assert cleaned[-1] == clean
    assert all("a@b.co" not in text for example in cleaned for text in texts_of(example))
    assert all(any("[email]" in text for text in texts_of(example)) for example in cleaned[:-1])
    assert list(without_pii(cleaned, Taken())) == cleaned


@settings(max_examples=60, deadline=None)
@given(st.one_of(HOLDS["trl"], HOLDS["labels"]))
def test_redaction_is_idempotent_and_leaves_clean_examples_alone(example: FeedbackExample) -> None:
    [once] = redacted([example], Taken())
    assert list(redacted([once], Taken())) == [once]
    if not any(map(find, texts_of(example))):
        assert once == example


def test_a_long_text_of_digits_or_letters_is_searched_in_linear_time() -> None:
    for text in (
        "1 " * 50_000,
        "a." * 50_000,
        "a@" * 50_000,
        ":" * 100_000,
        "1." * 50_000,
        "+1-" * 30_000,
        "x" * 100_000,
    ):
        assert len(find(text)) >= 0
