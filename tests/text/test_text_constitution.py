"""The constitution: ours is whole in both languages, its hash follows every word, others' faults are named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fledge.config import to_json
from fledge.errors import ConfigError
from fledge.text.constitution import LANGUAGES, Constitution, load


def written(path: Path, change: dict[str, Any]) -> Path:
    path.write_text(json.dumps({**to_json(load()), **change}, ensure_ascii=False), encoding="utf-8")
    return path


def test_ours_has_principles_and_rules_in_both_languages() -> None:
    own = load()
    assert len(own.principles) >= 10
    assert {rule.group for rule in own.rules} == {"harm", "honesty", "helpfulness"}
    for principle in own.principles:
        for language in LANGUAGES:
            wording = principle.wording(language)
            assert len({wording.critique, wording.revision, wording.compare}) == 3
        assert any("\u4e00" <= letter <= "\u9fff" for letter in principle.zh.critique)
    assert all(rule.text("zh") != rule.text("en") for rule in own.rules)


def test_the_hash_follows_every_word_and_the_label_names_it(tmp_path: Path) -> None:
    own = load()
    assert load(written(tmp_path / "same.json", {})).hash == own.hash
    changed = replace(own, rules=(replace(own.rules[0], en=own.rules[0].en + "!"), *own.rules[1:]))
    assert changed.hash != own.hash
    assert own.label == f"fledge {own.version} {own.hash[:12]}"
    assert isinstance(own, Constitution)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"principles": [], "rules": []}, "neither principles nor rules"),
        ({"rules": [{"id": "a", "group": "harm", "en": "x", "zh": " "}]}, "empty text"),
        ({"rules": [{"id": "a", "group": "harm", "en": "x", "zh": "y"}] * 2}, "rules a stand there twice"),
        ({"rules": [{"id": "a", "en": "x", "zh": "y"}]}, r"missing key 'rules\[0\]"),
        ({"rulez": []}, "did you mean 'rules'"),
    ],
)
def test_what_is_no_constitution_is_refused_by_name(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load(written(tmp_path / "c.json", change))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "half.json")


def test_a_rule_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="no principle 'x': known are harm"):
        load().principle("x")
