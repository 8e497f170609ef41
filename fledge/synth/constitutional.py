"""Constitutional AI: answers criticised and revised by principle, then preferences as soft labels.

Source: Bai et al. 2022 (2212.08073). First part (section 3): the model answers, criticises its answer by a principle
drawn at random, revises it, several times over; the revisions are demonstrations. Second part (section 4): of two
answers, the model says which one a principle prefers; the label is the normalised probability of (A) and (B), not a
choice. With a chain of thought, that probability is nearly 0 or 1 and is clamped to 40-60 % (section 4.1).

Here every comparison is asked in both orders, and the log-odds of the two are averaged: a liking for the first place,
whatever its strength, cancels exactly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fledge.config import check_range, to_json
from fledge.data.prompt_split import prompt_text
from fledge.errors import ConfigError, DataError
from fledge.synth.dialogue_texts import PHRASES, Phrases, answer_prompt, dialogue_text, next_speakers
from fledge.synth.generating import Ask, Generator, Model, Progress, unwatched
from fledge.synth.journal import open_journal
from fledge.text.constitution import Constitution, Language, Principle
from fledge.types import (
    ChatExample,
    Conversation,
    Judgement,
    Metrics,
    PairExample,
    PromptExample,
    Provenance,
    SamplingParams,
)

MADE = "made by a model"


@dataclass(frozen=True)
class RevisionConfig:
    """`revisions` critiques and revisions a prompt (4 in the paper), each by a principle drawn with replacement.

    `maker` names the model: work of one model is not gone on with by another.
    """

    maker: str = ""
    language: Language = "en"
    revisions: int = 4
    seed: int = 0
    batch: int = 32
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=512))

    def __post_init__(self) -> None:
        check_range(self, "seed", 0)
        if min(self.revisions, self.batch) < 1:
            raise ConfigError(f"revisions and batch must be at least 1, got {self.revisions} and {self.batch}")


@dataclass(frozen=True)
class Step:
    """One critique and revision. `revision` is the answer from here on: the one before it, where none came."""

    principle: str
    critique: str
    revision: str


@dataclass(frozen=True)
class Chain:
    """A prompt, the model's first answer, and what became of it."""

    prompt: PromptExample
    answer: str
    steps: tuple[Step, ...]

    def demonstration(self, grounds: str) -> ChatExample:
        """The prompt with its last revision; only that is learned."""
        context = tuple(replace(message, is_learned=False) for message in self.prompt.prompt.messages)
        talk = replace(self.prompt.prompt, messages=context).then("assistant", self.steps[-1].revision)
        origin = self.prompt.provenance
        return ChatExample(talk, Provenance(f"{origin.source}/revised by {grounds}", origin.id, MADE))


def revise(
    model: Generator,
    prompts: Sequence[PromptExample],
    constitution: Constitution,
    config: RevisionConfig,
    journal_path: Path | None = None,
    progress: Progress = unwatched,
) -> list[Chain]:
    """A chain a prompt. With a journal, a killed run goes on where it stopped; `RunError` if it is of other work.

    Prompts to which the model says nothing at all are left out.
    """
    if not constitution.principles:
        raise ConfigError(f"{constitution.label} has no principles to revise by; add some")
    what = {"constitution": constitution.label, "config": to_json(config), "prompts": prompts_hash(prompts)}
    with open_journal(journal_path, what) as journal:
        for start in range(len(journal.entries), len(prompts), config.batch):
            batch = list(enumerate(prompts))[start : start + config.batch]
            for chain in _revise(model, batch, constitution, config):
                journal.append({"answer": chain.answer, "steps": [to_json(step) for step in chain.steps]})
            progress("revisions", len(journal.entries), len(prompts))
        chains = [
            Chain(prompt, entry["answer"], tuple(Step(**step) for step in entry["steps"]))
            for prompt, entry in zip(prompts, journal.entries, strict=True)
        ]
    return [chain for chain in chains if chain.answer]


def _revise(
    model: Generator,
    numbered: Sequence[tuple[int, PromptExample]],
    constitution: Constitution,
    config: RevisionConfig,
) -> list[Chain]:
    """Answer, then critique and revision in turn, all prompts side by side; each draws from seeds of its own."""
    phrases = PHRASES[config.language]
    rngs = [np.random.default_rng([config.seed, number]) for number, _ in numbered]
    prompts = [example.prompt for _, example in numbered]
    first = _say(model, [answer_prompt(prompt, phrases) for prompt in prompts], rngs, config, prompts)
    answers, steps = list(first), [list[Step]() for _ in numbered]
    for _ in range(config.revisions):
        drawn = [constitution.principles[rng.integers(len(constitution.principles))] for rng in rngs]
        asked = [
            _critique_prompt(prompt.then("assistant", answer), principle, config.language)
            for prompt, answer, principle in zip(prompts, answers, drawn, strict=True)
        ]
        critiques = _say(model, asked, rngs, config)
        asked = [
            f"{text} {critique}\n\n{phrases.revision_request}: {principle.wording(config.language).revision}"
            f"\n\n{phrases.revision}:"
            for text, critique, principle in zip(asked, critiques, drawn, strict=True)
        ]
        revisions = _say(model, asked, rngs, config)
        answers = [new or old for new, old in zip(revisions, answers, strict=True)]
        for chain, principle, critique, answer in zip(steps, drawn, critiques, answers, strict=True):
            chain.append(Step(principle.id, critique, answer))
    return [
        Chain(example, answer, tuple(chain)) for (_, example), answer, chain in zip(numbered, first, steps, strict=True)
    ]


def _say(
    model: Generator,
    prompts: Sequence[str],
    rngs: Sequence[np.random.Generator],
    config: RevisionConfig,
    conversations: Sequence[Conversation] | None = None,
) -> list[str]:
    stop = next_speakers(PHRASES[config.language])
    seeds = [int(rng.integers(1 << 31)) for rng in rngs]
    talks: Sequence[Conversation | None] = conversations or [None] * len(prompts)
    asks = [
        Ask(prompt, replace(config.sampling, seed=seed), stop, talk)
        for prompt, seed, talk in zip(prompts, seeds, talks, strict=True)
    ]
    return [reply.text.strip() for reply in model.generate(asks)]


def _critique_prompt(conversation: Conversation, principle: Principle, language: Language) -> str:
    phrases = PHRASES[language]
    request = f"{phrases.critique_request}: {principle.wording(language).critique}"
    return f"{dialogue_text(conversation, phrases)}\n\n{request}\n\n{phrases.critique}:"


@dataclass(frozen=True)
class LabelConfig:
    """`thinking` asks for a chain of thought before the verdict, and clamps to `clamp`; without it nothing is clamped.

    `principles` of them are drawn for each pair and their log-odds averaged. `labeler` names the model in the labels.
    """

    labeler: str
    language: Language = "en"
    thinking: bool = False
    clamp: tuple[float, float] = (0.4, 0.6)
    principles: int = 1
    seed: int = 0
    batch: int = 32
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=256))

    def __post_init__(self) -> None:
        check_range(self, "seed", 0)
        low, high = self.clamp
        if min(self.principles, self.batch) < 1 or not 0 <= low <= 0.5 <= high <= 1:
            raise ConfigError(f"labels need principles and batch of 1 or more and a clamp around 0.5, got {self}")


@dataclass(frozen=True)
class Candidates:
    """Two answers to one prompt, in no order."""

    prompt: Conversation
    answers: tuple[str, str]
    provenance: Provenance


@dataclass(frozen=True)
class Labelled:
    """Pairs in the order of the candidates, the better answer first. Metrics: `label_confidence` (mean probability of
    the better answer), `label_consistency` (share of comparisons in which both orders prefer the same answer),
    `label_position_bias` (mean log-odds, in nats, of what is shown first; 0 is none)."""

    pairs: tuple[PairExample, ...]
    metrics: Metrics


@dataclass(frozen=True)
class _Comparison:
    """Log-odds that the first answer is better, asked with it in the first place and in the second."""

    principle: str
    shown_first: float
    shown_second: float
    thought: str

    @property
    def log_odds(self) -> float:
        return (self.shown_first + self.shown_second) / 2


def label(
    model: Model,
    candidates: Sequence[Candidates],
    constitution: Constitution,
    config: LabelConfig,
    journal_path: Path | None = None,
    progress: Progress = unwatched,
) -> Labelled:
    """Soft preference labels. With a journal, a killed run goes on where it stopped.

    Raises `DataError` if there is nothing to label or two answers are the same text.
    """
    if not candidates or any(one.answers[0] == one.answers[1] for one in candidates):
        raise DataError("labels need pairs of different answers; drop the candidates whose answers are the same")
    if len(constitution.principles) < config.principles:
        raise ConfigError(
            f"{constitution.label} has {len(constitution.principles)} principles, not {config.principles}"
        )
    asked = [PromptExample(one.prompt.then("assistant", "\n".join(one.answers)), one.provenance) for one in candidates]
    what = {"constitution": constitution.label, "config": to_json(config), "prompts": prompts_hash(asked)}
    with open_journal(journal_path, what) as journal:
        for start in range(len(journal.entries), len(candidates), config.batch):
            batch = list(enumerate(candidates))[start : start + config.batch]
            for comparisons in _compare(model, batch, constitution, config):
                journal.append({"comparisons": [to_json(each) for each in comparisons]})
            progress("labels", len(journal.entries), len(candidates))
        found = [[_Comparison(**each) for each in entry["comparisons"]] for entry in journal.entries]
    pairs = tuple(_pair(one, each, constitution, config) for one, each in zip(candidates, found, strict=True))
    return Labelled(pairs, _metrics(pairs, [each for comparisons in found for each in comparisons]))


def soft_label(log_odds: Sequence[float], clamp: tuple[float, float] | None) -> float:
    """P(first is better): the sigmoid of the mean of log-odds, clamped if asked for."""
    mean = math.fsum(log_odds) / len(log_odds)
    probability = 1 / (1 + math.exp(-mean)) if mean > -700 else 0.0
    return probability if clamp is None else min(max(probability, clamp[0]), clamp[1])


def _compare(
    model: Model, numbered: Sequence[tuple[int, Candidates]], constitution: Constitution, config: LabelConfig
) -> list[list[_Comparison]]:
    """For each pair a comparison by each principle drawn, in both orders; all of them are asked at once."""
    phrases = PHRASES[config.language]
    rngs = [np.random.default_rng([config.seed, number]) for number, _ in numbered]
    count, total = config.principles, len(constitution.principles)
    drawn = [constitution.principles[n] for rng in rngs for n in rng.choice(total, count, replace=False)]
    cases = [one for _, one in numbered for _ in range(count)]
    asked = [
        _question(one.prompt, order, principle, config.language)
        for one, principle in zip(cases, drawn, strict=True)
        for order in (one.answers, one.answers[::-1])
    ]
    thoughts = [""] * len(asked)
    if config.thinking:
        seeds = [int(rng.integers(1 << 31)) for rng in rngs for _ in range(2 * count)]
        thoughts = _think(model, asked, seeds, config)
        asked = [f"{text}\n\n{phrases.think} {said}" for text, said in zip(asked, thoughts, strict=True)]
    prompts = [f"{text}\n\n{phrases.verdict}:" for text in asked]
    odds = [a - b for a, b in model.score(prompts, [(phrases.first, phrases.second)] * len(prompts))]
    if not all(map(math.isfinite, odds)):
        raise DataError("the labelling model gave log-probabilities that are not numbers; it is broken")
    found = [
        _Comparison(principle.id, odds[2 * n], -odds[2 * n + 1], "\n\n".join(filter(None, thoughts[2 * n : 2 * n + 2])))
        for n, principle in enumerate(drawn)
    ]
    return [found[start : start + count] for start in range(0, len(found), count)]


def _think(model: Model, asked: Sequence[str], seeds: Sequence[int], config: LabelConfig) -> list[str]:
    """A chain of thought for each question, which ends before the verdict."""
    phrases = PHRASES[config.language]
    asks = [
        Ask(f"{text}\n\n{phrases.think}", replace(config.sampling, seed=seed), (f"\n{phrases.verdict}", "\n\n"))
        for text, seed in zip(asked, seeds, strict=True)
    ]
    return [reply.text.strip() for reply in model.generate(asks)]


def _question(prompt: Conversation, answers: Sequence[str], principle: Principle, language: Language) -> str:
    phrases: Phrases = PHRASES[language]
    options = "\n".join(f"{mark} {text}" for mark, text in zip(("(A)", "(B)"), answers, strict=True))
    talk, question = dialogue_text(prompt, phrases), principle.wording(language).compare
    return f"{phrases.consider}\n\n{talk}\n\n{question}\n\n{phrases.options}\n{options}"


def _pair(
    one: Candidates, comparisons: Sequence[_Comparison], constitution: Constitution, config: LabelConfig
) -> PairExample:
    clamp = config.clamp if config.thinking else None
    probability = soft_label([each.log_odds for each in comparisons], clamp)
    first, second = one.answers if probability >= 0.5 else one.answers[::-1]
    grounds = f"{constitution.label} / {', '.join(each.principle for each in comparisons)}"
    thought = "\n\n".join(each.thought for each in comparisons if each.thought) or None
    judgement = Judgement("ai", config.labeler, grounds=grounds, rationale=thought)
    certainty = max(probability, 1 - probability)
    return PairExample(one.prompt, first, second, one.provenance, certainty, judgement=judgement)


def _metrics(pairs: Sequence[PairExample], comparisons: Sequence[_Comparison]) -> Metrics:
    agreeing = sum(each.shown_first * each.shown_second > 0 for each in comparisons)
    bias = math.fsum((each.shown_first - each.shown_second) / 2 for each in comparisons)
    return {
        "label_confidence": math.fsum(pair.probability for pair in pairs) / len(pairs),
        "label_consistency": agreeing / len(comparisons),
        "label_position_bias": bias / len(comparisons),
    }


def prompts_hash(prompts: Sequence[PromptExample]) -> str:
    """By which a journal knows whether it is of the same prompts, in the same order."""
    digest = hashlib.sha256()
    for example in prompts:
        digest.update(prompt_text(example.prompt).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
