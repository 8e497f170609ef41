"""The constitution: the principles and rules that models are made to follow, as a versioned data file.

`constitution.json` beside this file is fledge's own; `load` reads any other of its form. A principle holds a critique
request, a revision request and a comparison question (Bai et al. 2022, 2212.08073, appendix C); a rule is judged on its
own, with yes or no (Glaese et al. 2022, 2209.14375, table 2). Every label keeps version and hash of what it followed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

from fledge.config import config_hash, from_json
from fledge.errors import ConfigError

Language = Literal["en", "zh"]
ItemT = TypeVar("ItemT")
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True)
class Wording:
    """A principle in one language; `compare` is a question that answers (A) or (B) answer."""

    critique: str
    revision: str
    compare: str


@dataclass(frozen=True)
class Principle:
    id: str
    en: Wording
    zh: Wording

    def wording(self, language: Language) -> Wording:
        return self.en if language == "en" else self.zh


@dataclass(frozen=True)
class Rule:
    """What an answer must not do. `group` is "harm", "honesty" or "helpfulness", or the user's own."""

    id: str
    group: str
    en: str
    zh: str

    def text(self, language: Language) -> str:
        return self.en if language == "en" else self.zh


@dataclass(frozen=True)
class Constitution:
    """`hash` changes with any word of it; `version` is the maker's to raise."""

    name: str
    version: str
    principles: tuple[Principle, ...]
    rules: tuple[Rule, ...]

    @property
    def hash(self) -> str:
        return config_hash(self)

    @property
    def label(self) -> str:
        """How labels name it: "name version hash", the hash in its first 12 letters."""
        return f"{self.name} {self.version} {self.hash[:12]}"

    def principle(self, identity: str) -> Principle:
        return _named(identity, {each.id: each for each in self.principles}, "principle")

    def rule(self, identity: str) -> Rule:
        return _named(identity, {each.id: each for each in self.rules}, "rule")


def load(path: Path | None = None) -> Constitution:
    """fledge's own constitution, or the one at `path`; `ConfigError` for a file that is not one."""
    try:
        text = (path or files("fledge.text") / "constitution.json").read_text(encoding="utf-8")
        data: Any = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a constitution ({error}); see docs/constitutional-ai.md"
        ) from error
    try:
        constitution = from_json(Constitution, data)
    except ConfigError as error:
        raise ConfigError(f"{path} is no constitution ({error}); see docs/constitutional-ai.md") from error
    _check(constitution, str(path or "fledge's constitution"))
    return constitution


def _check(constitution: Constitution, where: str) -> None:
    for name, items in (("principles", constitution.principles), ("rules", constitution.rules)):
        ids = [item.id for item in items]
        if twice := sorted({identity for identity in ids if ids.count(identity) > 1}):
            raise ConfigError(f"{where}: {name} {', '.join(twice)} stand there twice; give each its own id")
    if not constitution.principles and not constitution.rules:
        raise ConfigError(f"{where} has neither principles nor rules; add some")
    texts = [t for p in constitution.principles for w in (p.en, p.zh) for t in (w.critique, w.revision, w.compare)]
    texts += [text for rule in constitution.rules for text in (rule.en, rule.zh)]
    if not all(text.strip() for text in texts):
        raise ConfigError(f"{where} has an empty text; every principle and rule is worded in English and in Chinese")


def _named(identity: str, items: dict[str, ItemT], kind: str) -> ItemT:
    if identity not in items:
        raise ConfigError(f"the constitution has no {kind} '{identity}': known are {', '.join(items)}")
    return items[identity]
