"""The rewards of an alignment run: a weighted sum of reward models, ensembles of them, rule reward models, Python
functions and verifiers.

`reward_parts` pins in the plan what the user named; `reward_sum` makes of it the one scorer that the algorithms ask.
Functions and verifiers run in confined processes (rl/judge.py), never in the trainer's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fledge.errors import ConfigError
from fledge.files import sha256_file
from fledge.formats.checkpoint import LoadedModel
from fledge.recipes.align_data import HELD_OUT, TRAIN, Asking, askings_of, cut_of
from fledge.recipes.align_models import Context, load_scorer, refuse_other_weights, scalar, scorer_name
from fledge.recipes.align_plan import RewardPart, StartPlan
from fledge.recipes.align_rules import RuleOrder, RuleScorer, rules_part
from fledge.recipes.answers import score_answers
from fledge.recipes.runs import resolve_model
from fledge.rl.ensemble import EnsembleScorer, combined
from fledge.rl.judge import Judge, Verifier
from fledge.rl.rewards import Failure, Part, Records, RewardSum, VerifierReward
from fledge.rl.rollout import RewardModelScorer, Scorer

DEFAULT_CAUTION = 1.0  # spreads taken off an ensemble's mean, where nobody says how many


@dataclass(frozen=True)
class RewardOrder:
    """What the user asked for: (name, weight) of reward models, where NAME,NAME is an ensemble; (name, weight, options)
    of verifiers; (FILE:NAME, weight) of Python functions. `caution` is that of every ensemble."""

    models: Sequence[tuple[str, float]] = ()
    verifiers: Sequence[tuple[str, float, Mapping[str, Any]]] = ()
    functions: Sequence[tuple[str, float]] = ()
    caution: float = DEFAULT_CAUTION
    rules: RuleOrder = field(default_factory=RuleOrder)


def reward_parts(order: RewardOrder, runs: Path, start: LoadedModel) -> tuple[RewardPart, ...]:
    """The summands with the hashes of what they are; `UserError` for one that cannot be used."""
    parts = [_model_part(name, weight, order.caution, runs, start) for name, weight in order.models]
    for name, weight, told in order.verifiers:
        _ = Verifier(name, told)  # refuses an unknown name
        parts.append(RewardPart("verifier", name, weight, None, dict(told)))
    parts += [rules_part(name, weight, order.rules, runs, start) for name, weight in order.rules.models]
    return (*parts, *(_function_part(text, weight) for text, weight in order.functions))


def _model_part(text: str, weight: float, caution: float, runs: Path, start: LoadedModel) -> RewardPart:
    names = [member for name in text.split(",") for member in _members(name.strip(), runs)]
    pinned = tuple(StartPlan(name, load_scorer(name, runs, start).hash) for name in names)
    if len({member.hash for member in pinned}) < len(pinned):
        raise ConfigError(f"--reward {text}: two of its models have the same weights; name each once")
    if len(pinned) == 1:
        return RewardPart("model", pinned[0].name, weight, pinned[0].hash)
    return RewardPart("model", text, weight, pinned[0].hash, {}, pinned, caution)


def _members(name: str, runs: Path) -> list[str]:
    """`name` and the further members that were trained beside it: RUN:reward, RUN:reward-2, RUN:reward-3 ..."""
    name = scorer_name(name, runs)
    run, colon, stage = name.partition(":")
    if not colon:
        return [name]
    folder = resolve_model(name, runs).parents[1]
    found = [name]
    while (folder / f"{stage}-{len(found) + 1}" / "manifest.json").is_file():
        found.append(f"{run}:{stage}-{len(found) + 1}")
    return found


def _function_part(text: str, weight: float) -> RewardPart:
    file, colon, name = text.rpartition(":")
    path = Path(file).expanduser()
    if not colon or not name.isidentifier() or not path.is_file():
        raise ConfigError(f"--function {text}: expected FILE.py:NAME of a function in a Python file that exists")
    options = {"path": str(path.resolve()), "function": name}
    _ = Verifier("custom", options)  # refuses where nothing can be confined
    return RewardPart("function", name, weight, sha256_file(path), options)


def reward_sum(context: Context, start: LoadedModel, judge: Judge, asked: Sequence[Asking]) -> RewardSum:
    """The plan's rewards as one scorer of answers to the prompts `asked`; failures go to `failed_rewards.jsonl`."""

    def record(failure: Failure) -> None:
        with (context.path / "failed_rewards.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(failure), ensure_ascii=False) + "\n")

    return RewardSum(
        parts=[_part(context, part, start, judge) for part in context.plan.rewards],
        records=Records.of([asking.ids for asking in asked], [asking.record for asking in asked]),
        decode=start.tokenizer.decode,
        stop_ids=frozenset((start.renderer.end_id,)),  # a base model's end of text is no end of an answer
        max_failed=context.plan.max_failed_rewards,
        on_failure=record,
    )


def _part(context: Context, part: RewardPart, start: LoadedModel, judge: Judge) -> Part:
    if part.kind == "verifier":
        return Part.text(part.name, VerifierReward(Verifier(part.name, part.options), judge), part.weight)
    if part.kind == "function":
        _refuse_other_function(part)
        return Part.text(part.name, VerifierReward(Verifier("custom", part.options), judge), part.weight)
    if part.kind == "rules":
        return Part.model(part.name, rule_scorer(context, part, start), part.weight)
    rows = getattr(context.plan.train, "forward_rows", 64)
    scorers: list[Scorer] = [RewardModelScorer(scalar(loaded), rows) for loaded in loaded_models(context, part, start)]
    scorer = EnsembleScorer(scorers, part.caution) if part.members else scorers[0]
    return Part.model(part.name, scorer, part.weight)


def rule_scorer(context: Context, part: RewardPart, start: LoadedModel) -> RuleScorer:
    """The rule reward model of a part, for every prompt of the run."""
    (loaded,) = loaded_models(context, part, start)
    cut = cut_of(context, start.renderer)
    asked = [asking for side in (TRAIN, HELD_OUT) for asking in askings_of(context, side, cut)]
    return RuleScorer(loaded, tuple(part.options["rules"].values()), {a.ids: a.conversation for a in asked})


def _refuse_other_function(part: RewardPart) -> None:
    path = Path(part.options["path"])
    if not path.is_file() or sha256_file(path) != part.hash:
        raise ConfigError(f"{path} is not the file this run began with; restore it, or start a new run with --name")


def loaded_models(context: Context, part: RewardPart, start: LoadedModel) -> list[LoadedModel]:
    """The reward models of a part, unchanged since the plan was made (C45)."""
    found = []
    for member in part.models:
        loaded = load_scorer(member.name, context.run.parent, start, context.device)
        refuse_other_weights(loaded, member.hash or loaded.hash)
        found.append(loaded)
    return found


def part_scores(
    context: Context, part: RewardPart, start: LoadedModel, answers: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Tensor:
    """What the reward model, ensemble or rule reward model of a part says to each (prompt ids, answer ids)."""
    if part.kind == "rules":
        return rule_scorer(context, part, start).score(answers)
    scores = [
        score_answers(scalar(loaded), answers, start.tokenizer.pad_id) for loaded in loaded_models(context, part, start)
    ]
    return combined(scores, part.caution)[0] if len(scores) > 1 else torch.as_tensor(scores[0])
