"""The built-in verifiers, each by known answers; they run here without their sandbox (test_rl_judge.py has that)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fledge.rl.verifier import VERIFIERS, Unjudgeable

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k-train.jsonl"


def score(name, completion, record=None, **options) -> float:
    return VERIFIERS[name](completion, record or {}, options)[0]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("He has 9.\n#### 72", "reasoning\n#### 72", 1),
        ("#### 1,072", "#### 1072", 1),
        ("#### $5.50.", "5.5", 1),
        ("#### 71 no, #### 72", "72", 1),
        ("#### 73", "72", 0),
        ("#### -3", "3", 0),
        ("72", "72", 0),
        ("####", "72", 0),
        ("#### nan", "72", 0),
        ("#### seventy", "72", 0),
    ],
)
def test_numeric_answer_is_what_follows_the_last_mark(completion, answer, expected):
    assert score("numeric_answer", completion, {"answer": answer}) == expected


def test_numeric_answer_may_be_the_last_number_or_near_it_if_asked():
    assert score("numeric_answer", "so 3 and 72.", {"answer": "72"}, last_number=True) == 1
    assert score("numeric_answer", "none here", {"answer": "72"}, last_number=True) == 0
    assert score("numeric_answer", "#### 3.14", {"answer": "3.1416"}, tolerance=0.01) == 1
    assert score("numeric_answer", "#### 3.14", {"answer": "3.1416"}) == 0


def test_every_answer_of_gsm8k_is_right_about_itself():
    if not GSM8K.is_file():
        pytest.skip("no GSM8K here")
    for line in GSM8K.read_text(encoding="utf-8").splitlines()[:500]:
        answer = json.loads(line)["answer"]
        assert score("numeric_answer", answer, {"answer": answer}) == 1
        assert score("numeric_answer", answer + "1", {"answer": answer}) == 0


def test_exact_match_ignores_white_space_around_and_case_if_asked():
    assert score("exact_match", " Paris\n", {"answer": "Paris"}) == 1
    assert score("exact_match", "paris", {"answer": "Paris"}) == 0
    assert score("exact_match", "paris", {"answer": ["Lyon", "Paris"]}, ignore_case=True) == 1


def test_regex_finds_or_matches_whole():
    assert score("regex", "call 555-1234 now", {"pattern": r"\d{3}-\d{4}"}) == 1
    assert score("regex", "call 555-1234 now", {"pattern": r"\d{3}-\d{4}"}, whole=True) == 0
    assert score("regex", "a\nb", pattern="a.b", whole=True) == 1


def test_json_is_judged_with_its_fence_and_its_keys():
    assert score("json_validity", '{"a": [1, 2]}') == 1
    assert score("json_validity", 'Here:\n```json\n{"a": 1}\n```') == 1
    assert score("json_validity", "{'a': 1}") == 0
    assert score("json_validity", "[NaN]") == 0
    assert score("json_validity", '{"a": 1}', {"keys": ["a", "b"]}) == 0
    assert score("json_validity", '{"a": 1}', keys=["a"]) == 1
    assert score("json_validity", "[" * 100_000) == 0


@pytest.mark.parametrize(
    ("name", "completion", "record"),
    [
        ("numeric_answer", "#### 3", {"answer": "three"}),
        ("exact_match", "x", {}),
        ("regex", "x", {"pattern": "("}),
        ("python_tests", "x = 1", {"tests": []}),
        ("python_tests", "x = 1", {"tests": ["pass"], "setup": "1 / 0"}),
    ],
)
def test_c54_record_that_cannot_be_judged_gives_no_score(name, completion, record):
    with pytest.raises(Unjudgeable):
        score(name, completion, record)
