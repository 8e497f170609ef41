"""The 13 categories against the published document, and in which script a text counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fledge.safety.categories import CATEGORIES, LEARNT, MINORS, NAMES, RULE_OF, script_of
from fledge.text import constitution

DOCUMENT = Path(__file__).parents[3] / "shared" / "data" / "openai-openapi.json"


def test_the_categories_are_those_of_the_published_document_in_its_order() -> None:
    if not DOCUMENT.is_file():
        pytest.skip(f"the published document is not at {DOCUMENT}")
    schemas = json.loads(DOCUMENT.read_text(encoding="utf-8"))["components"]["schemas"]
    result = schemas["CreateModerationResponse"]["properties"]["results"]["items"]["properties"]
    assert tuple(result["categories"]["properties"]) == NAMES
    kinds = result["category_applied_input_types"]["properties"]
    for category in CATEGORIES:
        assert ("image" in kinds[category.name]["items"]["enum"]) == category.has_images, category.name


def test_all_but_one_are_learnt_and_each_stands_under_a_rule_of_our_constitution() -> None:
    assert set(NAMES) - set(LEARNT) == {MINORS}
    ours = constitution.load()
    for rule in RULE_OF.values():
        assert ours.rule(rule).group == "harm"


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello", "latin"),
        ("你好", "han"),
        ("我用 Python 写程序", "han"),
        ("The word 你好 means hello", "latin"),
        ("Привет", "other"),
        ("", "latin"),
        ("123 !?", "latin"),
        ("Crème brûlée", "latin"),
        ("こんにちは", "other"),
    ],
)
def test_a_text_counts_to_the_script_of_most_of_its_letters(text: str, script: str) -> None:
    assert script_of(text) == script
