"""What the guard does with a verdict: whether it blocks, and how it says why. No torch, no HTTP.

A refusal names the category, the score and its threshold, and the rule of the constitution that stands behind it
(text/constitution.py: the same versioned file that AI feedback is given by), in the language of what was asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fledge.errors import ConfigError
from fledge.safety.categories import CATEGORIES, RULE_OF, script_of
from fledge.safety.classifier import Verdict
from fledge.text.constitution import Constitution

Mode = Literal["off", "score", "block"]
Side = Literal["input", "output"]
_ORDER: tuple[Mode, ...] = ("off", "score", "block")


@dataclass(frozen=True)
class GuardConfig:
    """What is done in-line with every request; a request may ask for more, never for less.

    While an answer is streamed, `hold_chars` characters of it are held back until they are checked together with the
    `context_chars` before them. No character leaves before it was part of a checked text.
    """

    input: Mode = "off"
    output: Mode = "off"
    hold_chars: int = 160
    context_chars: int = 320

    def __post_init__(self) -> None:
        if self.hold_chars < 1 or self.context_chars < 0:
            raise ConfigError(f"a guard holds back at least one character, got {self}")


def stricter(first: Mode, second: Mode) -> Mode:
    return max(first, second, key=_ORDER.index)


class SafetyGuard:
    """Words refusals by a constitution; `ConfigError` if that lacks a rule that a category stands under."""

    def __init__(self, constitution: Constitution) -> None:
        self.constitution = constitution
        for category in CATEGORIES:
            constitution.rule(category.rule)

    def refusal(self, verdict: Verdict, side: Side, thresholds: dict[str, float], asked: str) -> str:
        """Why nothing is answered; `asked` is what the user wrote, whose language it is said in."""
        worst = max(verdict.flagged, key=lambda name: verdict.scores[name])
        score, threshold = f"{verdict.scores[worst]:.2f}", f"{thresholds[worst]:.2f}"
        rule = self.constitution.rule(RULE_OF[worst])
        if script_of(asked) == "han":
            what = "您的请求" if side == "input" else "模型的回答"
            return (
                f"{what}被判为“{worst}”（得分 {score}，阈值 {threshold}），因此不予回答。"
                f"依据《{self.constitution.name}》第 {self.constitution.version} 版规则 {rule.id}：{rule.zh}"
            )
        what = "The request" if side == "input" else "The model's answer"
        return (
            f"{what} was flagged as {worst} (score {score}, threshold {threshold}), so it is not answered. "
            f"Rule {rule.id} of the constitution {self.constitution.name} {self.constitution.version}: {rule.en}"
        )
