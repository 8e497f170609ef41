"""Data that a model makes, as `fledge self-instruct` and `fledge constitution` run it: model in, files out.

The work itself is synth/'s; here a model is loaded, prompts are read, and what came of them is written in formats that
`fledge align` reads. Every folder holds journals, so that a killed command goes on where it stopped and ends with the
same files, and `report.json`, which says what became of every prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch

from fledge.data.feedback import FeedbackExample, answers_of, prompt_of
from fledge.data.interchange import format_named, read, records_of, write
from fledge.data.prompt_split import prompt_text
from fledge.data.reading import Drops
from fledge.data.records import BadRow, Intake
from fledge.errors import DataError, RunError
from fledge.evals.agreement import evaluate as agreement
from fledge.evals.agreement import labeler_of, verdicts
from fledge.files import write_json
from fledge.formats.checkpoint import LoadedModel
from fledge.infer.engine import Engine, EngineConfig
from fledge.infer.quantize import load_model
from fledge.recipes.imports import STAGE as IMPORTED
from fledge.recipes.ring import Listener
from fledge.recipes.runs import locked, resolve_model
from fledge.registry import family
from fledge.synth.answering import AnswerConfig, draw_answers
from fledge.synth.constitutional import Candidates, LabelConfig, RevisionConfig, label, revise
from fledge.synth.dialogue_texts import PHRASES, answer_prompt
from fledge.synth.generating import Ask, EngineModel
from fledge.synth.instruct_texts import Language
from fledge.synth.rules import Answered, RuleConfig, judge
from fledge.synth.seeds import seed_tasks
from fledge.synth.self_instruct import SelfInstructConfig, self_instruct
from fledge.text.constitution import Constitution
from fledge.types import (
    Conversation,
    Metrics,
    PairExample,
    PromptExample,
    Ranking,
    SamplingParams,
    TextExample,
    UnpairedExample,
)

Style = Literal["auto", "chat", "text"]
BASE_STAGES = ("pretrain", "code")  # models that continue texts and know no turns
CACHE_BYTES = 512 << 20


@dataclass(frozen=True)
class Maker:
    """A model that makes data. `identity` names it in journals and labels: the name, and the start of its hash;
    `positions` is the most tokens it reads, if there is a most."""

    identity: str
    model: EngineModel
    is_chat: bool
    positions: int | None = None


def load_maker(name: str, runs: Path, style: Style = "auto", device: torch.device | None = None) -> Maker:
    """The model of `RUN`, `RUN:STAGE`, an imported name or a folder.

    `style` "chat" asks it in its chat template, "text" has it continue the text; "auto" follows from what it is.
    Raises `RunError` if there is none, or none that speaks.
    """
    directory = resolve_model(name, runs)
    loaded = load_model(directory, device=device)
    if family(loaded.info.family).kind != "causal":
        raise RunError(f"{directory}: a {loaded.info.family} model writes nothing; name a language model")
    is_chat = speaks_chat(loaded) if style == "auto" else style == "chat"
    engine = Engine(loaded.model, loaded.tokenizer, EngineConfig(CACHE_BYTES))  # type: ignore[arg-type]
    model = EngineModel(engine, loaded.tokenizer, loaded.renderer if is_chat else None)
    config: Any = loaded.model.config
    return Maker(f"{name} {loaded.hash[:12]}", model, is_chat, config.max_positions)


def speaks_chat(loaded: LoadedModel) -> bool:
    """Whether a model was trained to take turns: not a base model of ours, nor an imported one without a template."""
    if loaded.info.stage == IMPORTED:
        return loaded.template is not None
    return loaded.info.stage not in BASE_STAGES


@dataclass(frozen=True)
class Wanted:
    """Where prompts come from and how they are read."""

    paths: Sequence[Path]
    format: str | None = None
    skip_bad: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class Taken:
    """The examples of the files, and what was turned away."""

    examples: tuple[FeedbackExample, ...]
    drops: Drops
    skip_bad: bool = False


def take(wanted: Wanted) -> Taken:
    """Read the files; `DataError` for a bad row unless it may be skipped, and for files without a prompt."""
    drops, found = Drops(), list[FeedbackExample]()
    for path in wanted.paths:
        intake = Intake(bad=drops if wanted.skip_bad else None)
        found += [example for example in read(path, intake, name=wanted.format) if not isinstance(example, TextExample)]
    if not found:
        names = ", ".join(map(str, wanted.paths))
        raise DataError(f"{names}: no prompt in it; give rows with a prompt, such as {{'prompt': 'How ...?'}}")
    return Taken(tuple(found[: wanted.limit]), drops, wanted.skip_bad)


def fitting(taken: Taken, maker: Maker, max_tokens: int, language: Language) -> Taken:
    """The examples of which a prompt, or a prompt with the two longest answers that came with it, leaves this model
    room for `max_tokens` more; the others are bad rows: refused, or counted where they may be skipped."""
    if maker.positions is None:
        return taken
    room, kept = maker.positions - max_tokens, list[FeedbackExample]()
    intake = Intake(bad=taken.drops if taken.skip_bad else None)
    for example in taken.examples:
        prompt = prompt_of(example)
        ask = Ask(answer_prompt(prompt, PHRASES[language]), SamplingParams(max_tokens=max_tokens), (), prompt)
        longest = sorted(answers_of(example), key=len)[-2:]
        num_tokens = maker.model.num_tokens(ask, longest)
        if num_tokens <= room:
            kept.append(example)
            continue
        limit = f"it has {num_tokens} tokens, which leaves no room for {max_tokens} more in the model's "
        why = f"{limit}{maker.positions}; shorten or drop the row, or ask for fewer tokens"
        intake.turn_away(BadRow("too long", example.provenance.id, why))
    if not kept:
        raise DataError(f"all {len(taken.examples)} prompts are too long for the model's {maker.positions} positions")
    return replace(taken, examples=tuple(kept))


def prompts_of(examples: Iterable[FeedbackExample]) -> list[PromptExample]:
    """Every prompt once, in order."""
    unique: dict[str, PromptExample] = {}
    for example in examples:
        prompt = prompt_of(example)
        if prompt.messages:
            unique.setdefault(prompt_text(prompt), PromptExample(prompt, example.provenance))
    return list(unique.values())


# Self-Instruct.


def make_instructions(
    maker: Maker, seeds: Path | None, folder: Path, config: SelfInstructConfig, listener: Listener, *, skip_bad: bool
) -> dict[str, Any]:
    """`tasks.jsonl` and `report.json` in `folder`; returns the report."""
    drops = Drops()
    tasks = seed_tasks(seeds, language=config.language, bad=drops if skip_bad else None)
    config = replace(config, maker=maker.identity)
    with working_in(folder):
        report = self_instruct(maker.model, tasks, folder, config, _told(listener)).report
        report = {"maker": maker.identity, "seeds": len(tasks), "seed rows skipped": drops.to_json(), **report}
        write_json(folder / "report.json", report)
    return report


# Constitutional AI.


def make_revisions(
    maker: Maker, taken: Taken, constitution: Constitution, folder: Path, config: RevisionConfig, listener: Listener
) -> dict[str, Any]:
    """`demonstrations.jsonl` in `folder`, for `fledge align sft`; the chains stand in `revisions.jsonl`."""
    prompts = prompts_of(taken.examples)
    config = replace(config, maker=maker.identity)
    with working_in(folder):
        journal = folder / "revisions.jsonl"
        chains = revise(maker.model, prompts, constitution, config, journal, _told(listener))
        written, lost = _write(folder / "demonstrations.jsonl", [c.demonstration(constitution.label) for c in chains])
        changed = sum(chain.steps[-1].revision != chain.answer for chain in chains)
        report = {
            **_origin(maker, constitution, taken),
            "prompts": len(prompts),
            "demonstrations": written,
            "dropped": {"the model said nothing": len(prompts) - len(chains), **lost},
            "answers that revision changed": changed / len(chains) if chains else None,
            "principles": dict(Counter(step.principle for chain in chains for step in chain.steps).most_common()),
        }
        write_json(folder / "report.json", report)
    return report


def make_labels(
    makers: tuple[Maker, Maker],
    taken: Taken,
    constitution: Constitution,
    folder: Path,
    configs: tuple[LabelConfig, AnswerConfig],
    listener: Listener,
) -> dict[str, Any]:
    """`labels.jsonl` in `folder`: soft preferences between two answers, for `fledge align dpo` and `reward`.

    `makers` are who judges and who answers. Pairs and rankings among the examples bring their answers; to the other
    prompts two are drawn.
    """
    judging, answering = makers
    with working_in(folder):
        given = [one for example in taken.examples for one in _given(example)]
        drawn = _drawn(answering, taken, given, replace(configs[1], answers=2), folder, listener)
        usable, lost = _sound([Candidates(p.prompt, (a, b), p.provenance) for p, (a, b) in drawn])
        labelling = replace(configs[0], labeler=judging.identity)
        journal = folder / "comparisons.jsonl"
        candidates = [*given, *usable]
        found = label(judging.model, candidates, constitution, labelling, journal, _told(listener))
        answered_by = [None] * len(given) + [answering.identity] * len(usable)
        pairs = [_answered_by(pair, maker) for pair, maker in zip(found.pairs, answered_by, strict=True)]
        written, unwritable = _write(folder / "labels.jsonl", pairs, "labels")
        report = {
            **_origin(judging, constitution, taken),
            "answers of": answering.identity,
            "pairs given": len(given),
            "prompts answered": len(drawn),
            "labels": written,
            "dropped": {**lost, **unwritable},
            "metrics": found.metrics,
        }
        write_json(folder / "report.json", report)
    return report


def make_rule_labels(
    makers: tuple[Maker, Maker],
    taken: Taken,
    constitution: Constitution,
    folder: Path,
    configs: tuple[RuleConfig, AnswerConfig],
    listener: Listener,
) -> dict[str, Any]:
    """Every answer by every rule: verdicts in `labels.jsonl`, for `fledge align kto`; and in `rule_rankings.jsonl`,
    where answers to one prompt differ under a rule, rankings for a rule reward model."""
    judging, answering = makers
    with working_in(folder):
        given = [Answered(prompt_of(e), text, e.provenance) for e in taken.examples for text in answers_of(e)]
        drawn = _drawn(answering, taken, given, configs[1], folder, listener)
        everything = [*given, *(Answered(p.prompt, text, p.provenance) for p, texts in drawn for text in texts)]
        answers = [one for one in everything if one.answer]
        ruling = replace(configs[0], labeler=judging.identity)
        found = judge(judging.model, answers, constitution, ruling, folder / "judgements.jsonl", _told(listener))
        written, unwritable = _write(folder / "labels.jsonl", found.labels, "labels")
        rankings, _ = _write(folder / "rule_rankings.jsonl", rule_rankings(found.labels), "labels")
        report = {
            **_origin(judging, constitution, taken),
            "answers of": answering.identity,
            "answers judged": len(answers),
            "labels": written,
            "labels of broken rules": sum(not one.is_desirable for one in found.labels),
            "rankings": rankings,
            "dropped": {"the model said nothing": len(everything) - len(answers), **unwritable},
            "metrics": found.metrics,
        }
        write_json(folder / "report.json", report)
    return report


def rule_rankings(labels: Sequence[UnpairedExample]) -> list[Ranking]:
    """One ranking for each prompt under each rule of which some answers keep the rule and others break it."""
    together: dict[Conversation, dict[str, UnpairedExample]] = {}
    for one in labels:
        together.setdefault(one.prompt, {}).setdefault(one.completion, one)
    rankings = []
    for prompt, by_text in together.items():
        some = list(by_text.values())
        ranks = tuple(1 if one.is_desirable else 2 for one in some)
        if len(set(ranks)) > 1:
            texts = tuple(one.completion for one in some)
            many, first = len(some), some[0]
            makers = ("unknown",) * many
            rankings.append(
                Ranking(prompt, texts, ranks, (True,) * many, makers, first.provenance, judgement=first.judgement)
            )
    return rankings


# Whether to trust labels.


def measure_agreement(taken: Taken, seed: int) -> Metrics:
    """How labelers agree on comparisons and on single verdicts, and humans with models (evals/agreement.py)."""
    judged = [e for e in taken.examples if isinstance(e, PairExample | Ranking | UnpairedExample)]
    made_by_models = {labeler_of(e.judgement) for e in judged if e.judgement and e.judgement.kind != "human"}
    units = verdicts(judged)
    try:
        return agreement(units, is_ai=made_by_models.__contains__, seed=seed)
    except DataError as error:
        raise DataError(
            f"{len(units)} comparisons by {len({name for unit in units for name in unit})} labelers, none judged by "
            "two: label some pairs that people have judged (`fledge constitution label` on their file), or the reverse"
        ) from error


# What all of them share.


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Make the folder, and keep a second process out of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}); choose another --out") from error
    with locked(folder):
        yield


def _told(listener: Listener) -> Any:
    return lambda phase, done, total: listener.step(phase, done, total, {})


def _origin(maker: Maker, constitution: Constitution, taken: Taken) -> dict[str, Any]:
    return {"maker": maker.identity, "constitution": constitution.label, "rows skipped": taken.drops.to_json()}


def _given(example: FeedbackExample) -> list[Candidates]:
    """Every two different answers that an example brings, in the order of their texts, which says nothing of rank."""
    if not isinstance(example, PairExample | Ranking):
        return []
    texts = sorted(set(answers_of(example)))
    return [Candidates(example.prompt, (a, b), example.provenance) for a, b in combinations(texts, 2)]


def _drawn(
    answering: Maker,
    taken: Taken,
    given: Sequence[Candidates | Answered],
    config: AnswerConfig,
    folder: Path,
    listener: Listener,
) -> list[tuple[PromptExample, Sequence[str]]]:
    """Answers to the prompts that came without any."""
    known = {prompt_text(one.prompt) for one in given}
    prompts = [one for one in prompts_of(taken.examples) if prompt_text(one.prompt) not in known]
    config = replace(config, maker=answering.identity)
    said = draw_answers(answering.model, prompts, config, folder / "answers.jsonl", _told(listener))
    return list(zip(prompts, said, strict=True))


def _sound(drawn: Sequence[Candidates]) -> tuple[list[Candidates], dict[str, int]]:
    """(those with two different answers, why the others are left out)."""
    lost: Counter[str] = Counter()
    kept = []
    for one in drawn:
        if not all(one.answers):
            lost["the model said nothing"] += 1
        elif one.answers[0] == one.answers[1]:
            lost["both answers are the same"] += 1
        else:
            kept.append(one)
    return kept, dict(lost)


def _answered_by(pair: PairExample, maker: str | None) -> PairExample:
    assert pair.judgement is not None
    return replace(pair, judgement=replace(pair.judgement, policy_version=maker))


def _write(path: Path, examples: Sequence[FeedbackExample], name: str = "trl") -> tuple[int, dict[str, int]]:
    """(how many were written, how many the format cannot hold: a model may say what is no text)."""
    kept = []
    for example in examples:
        try:
            records_of(example, format_named(name))
        except DataError:
            continue
        kept.append(example)
    lost = len(examples) - len(kept)
    return write(path, kept, name=name), ({"what was said is no text": lost} if lost else {})
