"""The guard's rules: the stricter mode holds, and a refusal says why in the constitution's own words."""

from __future__ import annotations

import dataclasses

import pytest

from fledge.errors import ConfigError
from fledge.safety.categories import NAMES, RULE_OF
from fledge.safety.classifier import Verdict
from fledge.safety.guard import GuardConfig, SafetyGuard, stricter
from fledge.text import constitution

THRESHOLDS = dict.fromkeys(NAMES, 0.5)


def test_the_stricter_mode_holds() -> None:
    assert stricter("off", "score") == stricter("score", "off") == "score"
    assert stricter("block", "score") == stricter("off", "block") == "block"


@pytest.mark.parametrize("name", sorted(RULE_OF))
def test_a_refusal_names_category_score_threshold_rule_and_version(name: str) -> None:
    law = constitution.load()
    verdict = Verdict({**dict.fromkeys(NAMES, 0.1), name: 0.87}, (name,))
    for asked, text in (("Hello", law.rule(RULE_OF[name]).en), ("你好", law.rule(RULE_OF[name]).zh)):
        said = SafetyGuard(law).refusal(verdict, "input", THRESHOLDS, asked)
        for part in (name, "0.87", "0.50", RULE_OF[name], law.name, law.version, text):
            assert part in said


def test_the_worst_category_is_the_one_that_is_named() -> None:
    verdict = Verdict({**dict.fromkeys(NAMES, 0.1), "hate": 0.6, "violence": 0.9}, ("hate", "violence"))
    said = SafetyGuard(constitution.load()).refusal(verdict, "output", THRESHOLDS, "")
    assert "flagged as violence" in said
    assert said.startswith("The model's answer")


def test_a_constitution_without_a_rule_that_is_needed_is_refused() -> None:
    law = constitution.load()
    without = dataclasses.replace(law, rules=tuple(rule for rule in law.rules if rule.id != "no-hate"))
    with pytest.raises(ConfigError, match="no-hate"):
        SafetyGuard(without)


@pytest.mark.parametrize("sizes", [(0, 10), (10, -1)])
def test_a_guard_holds_back_something(sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError):
        GuardConfig(hold_chars=sizes[0], context_chars=sizes[1])
