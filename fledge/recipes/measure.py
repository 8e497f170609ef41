"""Measuring one model on its own: held-out text, its answers, multiple choice. What `fledge eval` calls.

Text and prompts are those that the model's run held out. Named sources replace them: documents are split by a hash of
their own, so the validation side of a source is the same for every run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fledge.config import from_json
from fledge.data.catalogue import source
from fledge.data.corpus import Corpus
from fledge.data.multiple_choice import MultipleChoice, benchmark, questions
from fledge.data.package import cache_home
from fledge.data.reading import Example
from fledge.errors import RunError
from fledge.evals import bits_per_byte, generation, multiple_choice
from fledge.evals.scorer import CausalScorer, NGramScorer, Scorer
from fledge.formats.checkpoint import LoadedModel
from fledge.infer.quantize import load_model
from fledge.models.ngram import NGram
from fledge.recipes.answers import Asked, base_answers, chat_answers
from fledge.recipes.chats import prompts
from fledge.recipes.plan import USER_CODE, RingPlan
from fledge.recipes.ring import Listener
from fledge.registry import family
from fledge.train.device import default_device, raise_malloc_thresholds
from fledge.types import ChatExample, Metrics, TextExample

CHAT_STAGES = ("sft", "ppo", "control")
NUM_EXAMPLES = 64  # questions of a benchmark set aside to be shown solved, never asked
EXAMPLES_SEED = 0  # fixed: every model is asked the same questions


@dataclass(frozen=True)
class MeasureOrder:
    """What to measure. `sources` (catalogue names) replace the run's held-out text and chats. `limit` bounds the
    documents of a source, the prompts, and the questions of a benchmark. `shots` are the numbers of examples to show.
    """

    sources: Sequence[str] = ()
    benchmarks: Sequence[str] = ()
    shots: Sequence[int] = (0, 1, 5)
    limit: int | None = None
    row_length: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """What was found; `benchmarks[name][shots]`. An empty dict says that there was nothing to measure it on."""

    model: LoadedModel
    row_length: int | None
    bits_per_byte: Metrics
    generation: Metrics
    benchmarks: dict[str, dict[int, Metrics]]


@dataclass
class _Material:
    """What a model is measured on. Lengths in tokens."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    chats: list[ChatExample] = field(default_factory=list)
    code: set[str] = field(default_factory=set)
    num_prompts: int = 192
    prompt_length: int = 96
    response_length: int = 64

    def add(self, examples: Iterable[Example]) -> None:
        for example in examples:
            if isinstance(example, TextExample):
                self.texts.setdefault(example.provenance.source, []).append(example.text)
            else:
                self.chats.append(example)


def measure(directory: Path, order: MeasureOrder, listener: Listener) -> Measured:
    """Measure the checkpoint in `directory`; `UserError` for what cannot be measured, as far as possible before any
    work. A model that only counts (n-grams) gives no answers here: generation needs a causal family.
    """
    for name in order.benchmarks:
        benchmark(name)
    raise_malloc_thresholds()
    loaded = load_model(directory, device=default_device())
    if family(loaded.info.family).kind == "scalar":
        raise RunError(f"{directory}: a reward or value model says no text; its accuracy stands on the run's card")
    run = run_of(directory)
    plan = None if run is None else read_plan(run)
    material = _material(directory, run, plan, order)
    scorer = scorer_of(loaded, plan, order.row_length)
    num_units = 2 + len(order.benchmarks) * len(order.shots)
    language = _language(scorer, loaded, material, order)
    listener.step("eval", 1, num_units, {})
    manners = _manners(loaded, material, order)
    listener.step("eval", 2, num_units, {})
    scores: dict[str, dict[int, Metrics]] = {}
    for name in order.benchmarks:
        scores[name] = {}
        asked, examples = set_aside(questions(name, cache=cache_home()))
        for num_shots in order.shots:
            scores[name][num_shots] = multiple_choice.evaluate(
                scorer,
                asked,
                examples,
                loaded.tokenizer,
                num_shots=num_shots,
                seed=order.seed,
                limit=order.limit,
            )
            listener.step("eval", 2 + sum(map(len, scores.values())), num_units, {})
    return Measured(loaded, scorer.row_length, language, manners, scores)


def language(loaded: LoadedModel, directory: Path, order: MeasureOrder) -> Metrics:
    """Bits per byte alone, of a model made from the checkpoint in `directory`; empty if there is no held-out text."""
    run = run_of(directory)
    if run is None and not order.sources:
        return {}
    plan = None if run is None else read_plan(run)
    material = _material(directory, run, plan, order)
    return _language(scorer_of(loaded, plan, order.row_length), loaded, material, order)


def run_of(directory: Path) -> Path | None:
    """The folder of the ring that a checkpoint `RUN/STAGE/model` lies in, or None: not that of an alignment run, which
    holds out prompts and no text."""
    run = directory.resolve().parent.parent
    path = run / "plan.json"
    if not path.is_file():
        return None
    with contextlib.suppress(ValueError):  # who reads the plan says what is wrong with it
        plan = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(plan, dict) and "method" in plan:
            return None
    return run


def read_plan(run: Path) -> RingPlan:
    """The plan of a run; `RunError` if this fledge cannot read it."""
    path = run / "plan.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data.pop("fledge", None)
        return from_json(RingPlan, data)
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: not a plan that this fledge reads ({error}); use the fledge that raised it") from error


def context_of(loaded: LoadedModel) -> int | None:
    """How many tokens a model reads at once: those of its chat training, at most its positions; None: unknown."""
    model: Any = loaded.model
    longest: int | None = model.config.max_positions
    run = run_of(loaded.directory)
    if run is None:
        return longest
    try:
        trained = read_plan(run).sft.fit.row_length
    except RunError:  # raised by another fledge: its weights may still be read
        return longest
    return trained if longest is None else min(trained, longest)


def scorer_of(loaded: LoadedModel, plan: RingPlan | None, row_length: int | None) -> Scorer:
    """How the model's likelihoods are read: rows of `row_length`, or of the length it was trained on.

    Raises `RunError` where neither is known, or where the model has fewer positions.
    """
    model: Any = loaded.model
    if isinstance(model, NGram):
        return NGramScorer(model)
    longest = model.config.max_positions
    trained = plan.pretrain.fit.row_length if plan is not None else longest
    length = row_length or trained
    if length is None:
        raise RunError(f"{loaded.directory}: nothing says how long a row this model reads; give --row-length")
    if longest is not None and length > longest:
        raise RunError(f"--row-length {length}: the model has {longest} positions; give at most that")
    return CausalScorer(model, row_length=length, pad_id=loaded.tokenizer.pad_id)


def set_aside(
    asked: Sequence[MultipleChoice],
) -> tuple[list[MultipleChoice], list[MultipleChoice]]:
    """(questions to ask, examples to show solved): disjoint, and the same for every model and seed."""
    order = np.random.default_rng(EXAMPLES_SEED).permutation(len(asked))
    shown = {int(index) for index in order[:NUM_EXAMPLES]}
    rest = [question for index, question in enumerate(asked) if index not in shown]
    return rest, [asked[index] for index in sorted(shown)]


def _material(directory: Path, run: Path | None, plan: RingPlan | None, order: MeasureOrder) -> _Material:
    material = _Material()
    if plan is not None:
        material.num_prompts = plan.evaluation.prompts
        material.prompt_length, material.response_length = plan.ppo.prompt_length, plan.ppo.response_length
        material.code = {*plan.corpus.code, USER_CODE}
    if order.sources:
        rows = [source(name) for name in order.sources]
        material.code |= {row.name for row in rows if row.kind == "code"}
        for row in rows:
            material.add(row.open("validation", cache=cache_home(), seed=order.seed))
    elif run is not None:
        material.add(Corpus.open(run / "corpus" / "documents", verify=True).examples("validation"))
    elif not order.benchmarks:
        raise RunError(f"{directory} lies in no run with held-out text; name a source with --source, or --benchmarks")
    return material


def _language(scorer: Scorer, loaded: LoadedModel, material: _Material, order: MeasureOrder) -> Metrics:
    if not material.texts:
        return {}
    code = material.code & set(material.texts)
    return bits_per_byte.evaluate(scorer, material.texts, loaded.tokenizer, code_sources=code, limit=order.limit)


def _manners(loaded: LoadedModel, material: _Material, order: MeasureOrder) -> Metrics:
    """How the model answers the human side of held-out chats, as its stage is asked: as a chat, or as lines of text."""
    if not material.chats or family(loaded.info.family).kind != "causal":
        return {}
    count = material.num_prompts if order.limit is None else min(order.limit, material.num_prompts)
    found = prompts(
        material.chats, loaded.renderer, count=count, max_tokens=material.prompt_length, seed=order.seed + 1
    )
    if not found:
        return {}
    asked = Asked([prompt.conversation for prompt in found], material.response_length)
    answer = chat_answers if loaded.info.stage in CHAT_STAGES else base_answers
    return generation.describe(answer(loaded, asked, order.seed))
