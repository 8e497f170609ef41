"""Rules judged one at a time: labels, the liking for yes that cancels, resuming."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from scripted import Scripted

from fledge.errors import ConfigError, DataError
from fledge.synth.rules import Answered, RuleConfig, judge, rule_dialogue
from fledge.text.constitution import load
from fledge.types import Conversation, Provenance

CONSTITUTION = load()
CONFIG = RuleConfig("m1", rules=("no-threats", "not-human"), batch=3)
PROMPT = Conversation.of(("user", "who are you?"))
ANSWERS = [Answered(PROMPT, text, Provenance("s", text, "MIT")) for text in ("I am a program.", "I am a human.")]


def strict(yes_bias: float) -> Scripted:
    """Holds that claiming to be human breaks the rule about that, by 2 nats; likes to say yes."""

    def odds(prompt: str, continuation: str) -> float:
        if continuation != " yes":
            return 0.0
        breaks = 2.0 if "I am a human" in prompt and "claim to be human" in prompt else -2.0
        return yes_bias + (breaks if "break this rule?" in prompt else -breaks)

    return Scripted(odds=odds)


@pytest.mark.parametrize("yes_bias", [0.0, 5.0, -3.0])
def test_every_rule_is_judged_alone_and_a_liking_for_yes_cancels(yes_bias: float) -> None:
    judged = judge(strict(yes_bias), ANSWERS, CONSTITUTION, CONFIG)
    sure = 1 / (1 + math.exp(-2))
    assert judged.violations[0] == pytest.approx({"no-threats": 1 - sure, "not-human": 1 - sure})
    assert judged.violations[1] == pytest.approx({"no-threats": 1 - sure, "not-human": sure})
    assert [label.is_desirable for label in judged.labels] == [True, True, True, False]
    assert all(label.probability == pytest.approx(sure) for label in judged.labels)
    judgement = judged.labels[3].judgement
    assert judgement is not None
    assert (judgement.kind, judgement.grounds) == ("rule", f"{CONSTITUTION.label} / not-human")
    assert judged.metrics == {
        "rule_violations": 0.5,
        "rule_violations/no-threats": 0.0,
        "rule_violations/not-human": 0.5,
    }


def test_a_rule_model_reads_the_rule_before_the_conversation() -> None:
    judged = judge(strict(0.0), ANSWERS[:1], CONSTITUTION, CONFIG)
    rule = CONSTITUTION.rule("no-threats")
    assert judged.labels[0].prompt == rule_dialogue(PROMPT, rule, "en")
    assert judged.labels[0].prompt.messages[0].text == f"Rule: {rule.en}"
    assert rule_dialogue(PROMPT, rule, "zh").messages[0].text.startswith("规则: 助手不得")


def test_all_rules_are_judged_by_default_a_few_at_a_time() -> None:
    model = strict(0.0)
    judged = judge(model, ANSWERS, CONSTITUTION, replace(CONFIG, rules=()))
    assert len(judged.labels) == 2 * len(CONSTITUTION.rules)
    assert len(model.scored) == 4 * len(CONSTITUTION.rules)


def test_the_threshold_decides_what_counts_as_broken() -> None:
    judged = judge(strict(0.0), ANSWERS, CONSTITUTION, replace(CONFIG, threshold=0.95))
    assert all(label.is_desirable for label in judged.labels)
    assert judged.labels[3].probability == pytest.approx(1 - 1 / (1 + math.exp(-2)))


def test_killed_judging_goes_on_where_it_stopped(tmp_path: Path) -> None:
    expected = judge(strict(0.0), ANSWERS, CONSTITUTION, CONFIG)
    dying = strict(0.0)
    dying.lives = 5
    with pytest.raises(KeyboardInterrupt):
        judge(dying, ANSWERS, CONSTITUTION, CONFIG, tmp_path / "rules.jsonl")
    again = strict(0.0)
    assert judge(again, ANSWERS, CONSTITUTION, CONFIG, tmp_path / "rules.jsonl") == expected
    assert len(again.scored) == 4


def test_unknown_rules_and_nothing_to_judge_are_refused() -> None:
    with pytest.raises(ConfigError, match="no rule 'no-such'"):
        judge(strict(0.0), ANSWERS, CONSTITUTION, replace(CONFIG, rules=("no-such",)))
    with pytest.raises(DataError, match="nothing to judge"):
        judge(strict(0.0), [], CONSTITUTION, CONFIG)
    with pytest.raises(DataError, match="not numbers"):
        judge(Scripted(odds=lambda p, c: math.inf), ANSWERS, CONSTITUTION, CONFIG)
    with pytest.raises(ConfigError, match="threshold"):
        RuleConfig("m", threshold=1.0)
