"""Rule reward models as rewards: an answer is scored under every rule by itself, beside a preference model.

A rule reward model learned from answers with the rule as system message in front (synth/rules.py, `fledge constitution
rules`), so that is how it is asked here: one reading a rule, whose mean is the part's score. Source: Glaese et al. 2022
(2209.14375), section 3: rule and preference models are trained and used side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fledge.formats.checkpoint import LoadedModel
from fledge.recipes.align_data import without_learning
from fledge.recipes.align_models import load_scorer, scalar
from fledge.recipes.align_plan import RewardPart
from fledge.recipes.answers import score_answers
from fledge.rl.rollout import Episodes
from fledge.synth.rules import rule_text, under_rule
from fledge.text.constitution import Language, load
from fledge.types import Conversation

Ids = tuple[int, ...]


@dataclass(frozen=True)
class RuleOrder:
    """Rule reward models (name of the run, weight), and what they are asked about: the rules `ids` of a constitution
    (none: all its rules), which is fledge's own unless a file is named, in the language of their training."""

    models: Sequence[tuple[str, float]] = ()
    ids: tuple[str, ...] = ()
    constitution: Path | None = None
    language: Language = "en"


def rules_part(name: str, weight: float, order: RuleOrder, runs: Path, start: LoadedModel) -> RewardPart:
    """The part as it stands in the plan, which holds the rules word by word; `UserError` for what cannot be used."""
    constitution = load(order.constitution)
    rules = [constitution.rule(identity) for identity in order.ids] or list(constitution.rules)
    told = {rule.id: rule_text(rule, order.language) for rule in rules}
    options = {"constitution": constitution.label, "rules": told}
    return RewardPart("rules", name, weight, load_scorer(name, runs, start).hash, options)


@dataclass(frozen=True)
class RuleScorer:
    """A `Scorer`: the mean, over the rules, of what the model says to an answer under each. `prompts` finds the
    conversation behind a prompt's ids."""

    loaded: LoadedModel
    rules: tuple[str, ...]
    prompts: Mapping[Ids, Conversation]

    def __call__(self, episodes: Episodes) -> Tensor:
        return self.score(episodes.spoken()).to(episodes.tokens_BT.device)

    def score(self, answers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
        """(B,) of (prompt ids, answer ids); the answer's ids are taken as they are (C10)."""
        under = {prompt: self._under(prompt) for prompt in {tuple(prompt) for prompt, _ in answers}}
        rows = [(asked, said) for prompt, said in answers for asked in under[tuple(prompt)]]
        scores = score_answers(scalar(self.loaded), rows, self.loaded.tokenizer.pad_id)
        return scores.view(len(answers), -1).mean(dim=1)

    def _under(self, prompt: Ids) -> list[Ids]:
        talk = without_learning(self.prompts[prompt])
        return [tuple(self.loaded.renderer.prompt(under_rule(talk, rule))) for rule in self.rules]
