"""Rules judged one at a time: did an answer break this rule? Labels for a rule reward model beside a preference model.

Source: Glaese et al. 2022 (2209.14375), sections 2.2 and 3.2: one judgement a rule is easier and more exact than one
about everything, and the rule model reads the rule with the dialogue. Each rule is asked about in both senses, broken
and kept, and the log-odds are averaged, so that a model's liking for "yes" cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fledge.config import to_json
from fledge.errors import ConfigError, DataError
from fledge.synth.constitutional import prompts_hash, soft_label
from fledge.synth.dialogue_texts import PHRASES, dialogue_text
from fledge.synth.generating import Progress, Scorer, unwatched
from fledge.synth.journal import open_journal
from fledge.text.constitution import Constitution, Language, Rule
from fledge.types import Conversation, Judgement, Metrics, PromptExample, Provenance, UnpairedExample


@dataclass(frozen=True)
class RuleConfig:
    """`rules` are the ids to judge by, all without it. An answer counts as breaking a rule from `threshold` on.
    At most `batch` questions are asked at once."""

    labeler: str
    language: Language = "en"
    rules: tuple[str, ...] = ()
    threshold: float = 0.5
    batch: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1 or self.batch < 1:
            raise ConfigError(f"rules need a threshold in (0, 1) and a batch of 1 or more, got {self}")


@dataclass(frozen=True)
class Answered:
    """An answer to be judged."""

    prompt: Conversation
    answer: str
    provenance: Provenance


@dataclass(frozen=True)
class Judged:
    """`labels`, answer by answer and rule by rule: desirable where the rule was kept, `probability` that of the label.
    `violations[n][rule id]` is P(answer n breaks the rule). Metrics: `rule_violations` (share of answers that break any
    rule), `rule_violations/<rule>`."""

    labels: tuple[UnpairedExample, ...]
    violations: tuple[dict[str, float], ...]
    metrics: Metrics


def judge(
    model: Scorer,
    answers: Sequence[Answered],
    constitution: Constitution,
    config: RuleConfig,
    journal_path: Path | None = None,
    progress: Progress = unwatched,
) -> Judged:
    """Every answer by every rule. With a journal, a killed run goes on where it stopped.

    Raises `DataError` if there is nothing to judge, `ConfigError` for a rule that the constitution lacks.
    """
    rules = [constitution.rule(identity) for identity in config.rules] if config.rules else list(constitution.rules)
    if not answers or not rules:
        raise DataError(f"nothing to judge: {len(answers)} answers and {len(rules)} rules")
    asked = [PromptExample(one.prompt.then("assistant", one.answer), one.provenance) for one in answers]
    what = {"constitution": constitution.label, "config": to_json(config), "prompts": prompts_hash(asked)}
    with open_journal(journal_path, what) as journal:
        for one in answers[len(journal.entries) :]:
            journal.append({"violations": _violations(model, one, rules, config)})
            progress("rules", len(journal.entries), len(answers))
        found = [entry["violations"] for entry in journal.entries]
    labels = tuple(
        _label(one, rule, violations[rule.id], constitution, config)
        for one, violations in zip(answers, found, strict=True)
        for rule in rules
    )
    return Judged(labels, tuple(found), _metrics(found, rules, config))


def rule_dialogue(prompt: Conversation, rule: Rule, language: Language) -> Conversation:
    """What a rule reward model reads: the rule as a system message before the conversation."""
    return under_rule(prompt, rule_text(rule, language))


def rule_text(rule: Rule, language: Language) -> str:
    """The rule as a rule reward model is told it."""
    return f"{PHRASES[language].rule}: {rule.text(language)}"


def under_rule(prompt: Conversation, text: str) -> Conversation:
    """The conversation under a rule that `rule_text` has worded."""
    return Conversation((*Conversation.of(("system", text)).messages, *prompt.messages), prompt.tools)


def _violations(model: Scorer, one: Answered, rules: Sequence[Rule], config: RuleConfig) -> dict[str, float]:
    phrases = PHRASES[config.language]
    talk = dialogue_text(one.prompt.then("assistant", one.answer), phrases)
    prompts = [
        f"{phrases.consider}\n\n{talk}\n\n{phrases.rule}: {rule.text(config.language)}\n\n{sense}\n{phrases.reply}"
        for rule in rules
        for sense in (phrases.breaks, phrases.keeps)
    ]
    batches = [prompts[start : start + config.batch] for start in range(0, len(prompts), config.batch)]
    scores = [row for batch in batches for row in model.score(batch, [(phrases.yes, phrases.no)] * len(batch))]
    odds = [yes - no for yes, no in scores]
    if not all(map(math.isfinite, odds)):
        raise DataError("the judging model gave log-probabilities that are not numbers; it is broken")
    return {rule.id: soft_label((odds[2 * n], -odds[2 * n + 1]), None) for n, rule in enumerate(rules)}


def _label(
    one: Answered, rule: Rule, violation: float, constitution: Constitution, config: RuleConfig
) -> UnpairedExample:
    is_broken = violation >= config.threshold
    judgement = Judgement("rule", config.labeler, grounds=f"{constitution.label} / {rule.id}")
    probability = violation if is_broken else 1 - violation
    prompt = rule_dialogue(one.prompt, rule, config.language)
    return UnpairedExample(prompt, one.answer, not is_broken, one.provenance, probability, judgement)


def _metrics(found: Sequence[dict[str, float]], rules: Sequence[Rule], config: RuleConfig) -> Metrics:
    broken = [{rule: p >= config.threshold for rule, p in violations.items()} for violations in found]
    metrics = {"rule_violations": sum(any(each.values()) for each in broken) / len(broken)}
    return metrics | {
        f"rule_violations/{rule.id}": sum(each[rule.id] for each in broken) / len(broken) for rule in rules
    }
