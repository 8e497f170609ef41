"""Self-Instruct: from a few seed tasks to a filtered, de-duplicated set of instructions with instances.

Source: Wang et al. 2023 (2212.10560). Three phases, each an append-only journal in the work folder, so that a killed
run goes on where it stopped and ends with the same tasks: instructions are proposed in rounds from 6 seeds and 2
made ones, filtered, and kept if their ROUGE-L with every earlier one is below 0.7; each is then judged classification
or not; last come its instances, input first, or label first for classification.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fledge.config import check_range, config_hash, to_json
from fledge.data.self_instruct import Instance, Task, task_record
from fledge.errors import ConfigError, DataError
from fledge.files import write_file, write_json
from fledge.synth import instruct_texts as texts
from fledge.synth.generating import Ask, Generator, Progress, unwatched
from fledge.synth.instruct_filters import reason_against, sound_instances
from fledge.synth.journal import Journal
from fledge.synth.rouge import NoveltyPool
from fledge.types import Completion, Provenance, SamplingParams

SIMILAR = "too similar"


@dataclass(frozen=True)
class SelfInstructConfig:
    """The paper's values (section 3.1 and appendix A.1), and how much to make.

    `requests` prompts make a round; the run ends with `target` instructions, or after `patience` rounds that gave
    none. Sampling: `propose` for instructions, `answer` for instances (greedy), each with `presence_penalty`.
    `maker` names the model: work of one model is not gone on with by another.
    """

    maker: str = ""
    target: int = 1000
    language: texts.Language = "en"
    seed: int = 0
    requests: int = 8
    human_examples: int = 6
    made_examples: int = 2
    proposals: int = 8
    max_rouge: float = 0.7
    patience: int = 50
    propose: SamplingParams = field(
        default_factory=lambda: SamplingParams(max_tokens=1024, temperature=0.7, top_p=0.5, presence_penalty=2.0)
    )
    answer: SamplingParams = field(
        default_factory=lambda: SamplingParams(max_tokens=350, temperature=0.0, presence_penalty=1.5)
    )
    decide_yes: int = 12
    decide_no: int = 19
    worked_examples: int = 8
    max_instances: int = 5
    batch: int = 32

    def __post_init__(self) -> None:
        check_range(self, "seed", 0)
        counts = (self.target, self.requests, self.human_examples, self.proposals, self.patience, self.batch)
        if min(*counts, self.max_instances, self.worked_examples) < 1 or not 0 < self.max_rouge <= 1:
            raise ConfigError(f"Self-Instruct needs counts of 1 or more and max_rouge in (0, 1], got {self}")


@dataclass(frozen=True)
class Made:
    """The tasks in the order of their instructions, and what became of everything: see `report.json`."""

    tasks: tuple[Task, ...]
    report: dict[str, Any]


def self_instruct(
    model: Generator,
    seeds: Sequence[Task],
    folder: Path,
    config: SelfInstructConfig,
    progress: Progress = unwatched,
) -> Made:
    """Make tasks from `seeds`; `tasks.jsonl` and `report.json` in `folder` are written last.

    May be killed at any time and called again with the same arguments. Raises `RunError` if the folder holds work of
    another config or other seeds, `DataError` if there are too few seeds to show.
    """
    _check(seeds, config)
    what = {"config": to_json(config), "seeds": _seeds_hash(seeds), "version": 1}
    journals = [
        Journal(folder / f"{name}.jsonl", {"phase": name, **what}) for name in ("instructions", "kinds", "made")
    ]
    try:
        instructions = _propose(model, seeds, journals[0], config, progress)
        kinds = _decide(model, seeds, instructions, journals[1], config, progress)
        made = _instantiate(model, seeds, list(zip(instructions, kinds, strict=True)), journals[2], config, progress)
    finally:
        for journal in journals:
            journal.close()
    tasks = tuple(_tasks(instructions, kinds, made, config))
    report = _report(journals, tasks)
    lines = [_task_line(task) for task in tasks]
    write_file(folder / "tasks.jsonl", lambda place: place.write_text("".join(lines), encoding="utf-8"))
    write_json(folder / "report.json", report)
    return Made(tasks, report)


def _task_line(task: Task) -> str:
    return json.dumps(task_record(task), ensure_ascii=False) + "\n"


def _propose(
    model: Generator, seeds: Sequence[Task], journal: Journal, config: SelfInstructConfig, progress: Progress
) -> list[str]:
    """Rounds of proposals until there are enough. A line of the journal is a round, and a round depends on the seed,
    its number and what was kept before it alone."""
    pool = NoveltyPool()
    for task in seeds:
        pool.add(task.instruction)
    made = [text for entry in journal.entries for text in entry["kept"]]
    for text in made:
        pool.add(text)
    idle = _trailing_idle(journal)
    while len(made) < config.target and idle < config.patience:
        number = len(journal.entries)
        asks = _proposal_asks(seeds, made, number, config)
        kept, dropped = _sift(model.generate(asks), pool, config, config.target - len(made))
        journal.append({"round": number, "kept": kept, "dropped": dict(dropped)})
        made += kept
        idle = 0 if kept else idle + 1
        progress("instructions", len(made), config.target)
    return made


def _proposal_asks(seeds: Sequence[Task], made: Sequence[str], number: int, config: SelfInstructConfig) -> list[Ask]:
    rng = np.random.default_rng([config.seed, 1, number])
    wording = texts.WORDINGS[config.language]
    asks = []
    for _ in range(config.requests):
        num_made = min(config.made_examples, len(made))
        num_seeds = config.human_examples + config.made_examples - num_made  # seeds fill in while nothing is made
        shown = [seeds[i].instruction for i in rng.choice(len(seeds), min(num_seeds, len(seeds)), replace=False)]
        shown += [made[i] for i in rng.choice(len(made), num_made, replace=False)] if num_made else []
        shown = [shown[i] for i in rng.permutation(len(shown))]
        seed = int(rng.integers(1 << 31))
        stop = texts.propose_stop(wording, len(shown) + 1 + config.proposals)
        params = replace(config.propose, seed=seed)
        asks.append(Ask(texts.propose_prompt(wording, shown), params, stop))
    return asks


def _sift(
    replies: Sequence[Completion], pool: NoveltyPool, config: SelfInstructConfig, room: int
) -> tuple[list[str], Counter[str]]:
    """(what is kept, at most `room`, and has gone into the pool; what was dropped by reason)."""
    kept: list[str] = []
    dropped: Counter[str] = Counter()
    for reply in replies:
        wording = texts.WORDINGS[config.language]
        found, num_cut = texts.parse_proposals(wording, reply.text, is_cut=reply.finish_reason == "length")
        dropped["cut off"] += num_cut
        for text in found:
            instruction = text[:1].upper() + text[1:]
            reason = reason_against(instruction, config.language)
            if reason is None and pool.nearest(instruction, config.max_rouge) is not None:
                reason = SIMILAR
            if reason is None and len(kept) >= room:
                reason = "more than asked for"
            if reason is not None:
                dropped[reason] += 1
                continue
            pool.add(instruction)
            kept.append(instruction)
    return kept, +dropped


def _trailing_idle(journal: Journal) -> int:
    idle = 0
    for entry in reversed(journal.entries):
        if entry["kept"]:
            break
        idle += 1
    return idle


def _decide(
    model: Generator,
    seeds: Sequence[Task],
    instructions: Sequence[str],
    journal: Journal,
    config: SelfInstructConfig,
    progress: Progress,
) -> list[bool]:
    """Whether each instruction is classification; a reply that says neither counts as no, and is counted."""
    wording = texts.WORDINGS[config.language]
    examples = _decided_examples(seeds, config)
    params = replace(config.answer, max_tokens=3, presence_penalty=0.0)
    for batch in _batches(len(journal.entries), len(instructions), config.batch):
        asks = [Ask(texts.decide_prompt(wording, examples, instructions[n]), params, ("\n",)) for n in batch]
        for n, reply in zip(batch, model.generate(asks), strict=True):
            journal.append({"task": n, "is_classification": texts.parse_decision(wording, reply.text)})
        progress("kinds", batch.stop, len(instructions))
    return [bool(entry["is_classification"]) for entry in journal.entries]


def _decided_examples(seeds: Sequence[Task], config: SelfInstructConfig) -> list[Task]:
    """Some of both kinds, in an order that does not give the kind away."""
    rng = np.random.default_rng([config.seed, 2])
    yes = [task for task in seeds if task.is_classification][: config.decide_yes]
    no = [task for task in seeds if not task.is_classification][: config.decide_no]
    both = [*yes, *no]
    return [both[i] for i in rng.permutation(len(both))]


def _instantiate(
    model: Generator,
    seeds: Sequence[Task],
    instructions: Sequence[tuple[str, bool]],
    journal: Journal,
    config: SelfInstructConfig,
    progress: Progress,
) -> list[list[Instance]]:
    """The sound instances of each instruction."""
    wording = texts.WORDINGS[config.language]
    for batch in _batches(len(journal.entries), len(instructions), config.batch):
        asks = [_instance_ask(seeds, instructions[n], n, config) for n in batch]
        for n, reply in zip(batch, model.generate(asks), strict=True):
            is_cut = reply.finish_reason == "length"
            kind = instructions[n][1]
            found, num_lost = texts.parse_instances(wording, reply.text, is_classification=kind, is_cut=is_cut)
            kept, dropped = sound_instances(found, at_most=config.max_instances)
            dropped["unreadable or cut off"] += num_lost
            record = [{"input": each.input, "output": each.output} for each in kept]
            journal.append({"task": n, "instances": record, "dropped": dict(+dropped)})
        progress("instances", batch.stop, len(instructions))
    return [[Instance(each["input"], each["output"]) for each in entry["instances"]] for entry in journal.entries]


def _instance_ask(seeds: Sequence[Task], task: tuple[str, bool], number: int, config: SelfInstructConfig) -> Ask:
    instruction, is_classification = task
    wording = texts.WORDINGS[config.language]
    alike = [seed for seed in seeds if seed.is_classification == is_classification]
    rng = np.random.default_rng([config.seed, 3, number])
    shown = [alike[i] for i in rng.choice(len(alike), min(config.worked_examples, len(alike)), replace=False)]
    prompt = texts.instances_prompt(wording, shown, instruction, is_classification=is_classification)
    beyond = () if is_classification else (f"\n{wording.example} {config.max_instances + 1}",)
    return Ask(prompt, config.answer, (f"\n{wording.task}:", *beyond))


def _batches(done: int, total: int, size: int) -> Iterator[range]:
    for start in range(done, total, size):
        yield range(start, min(start + size, total))


def _tasks(
    instructions: Sequence[str], kinds: Sequence[bool], made: Sequence[Sequence[Instance]], config: SelfInstructConfig
) -> Iterator[Task]:
    source = f"self-instruct/{config_hash(config)[:12]}{f' by {config.maker}' if config.maker else ''}"
    for number, (text, kind, instances) in enumerate(zip(instructions, kinds, made, strict=True)):
        if instances:
            identity = f"task_{number}"
            yield Task(
                identity, identity, text, tuple(instances), kind, Provenance(source, identity, "made by a model")
            )


def _report(journals: Sequence[Journal], tasks: Sequence[Task]) -> dict[str, Any]:
    """The yield of every filter: what came in, what was dropped by which, what is left."""
    rounds, kinds, made = (journal.entries for journal in journals)
    dropped: Counter[str] = Counter()
    for entry in rounds:
        dropped.update(entry["dropped"])
    kept = sum(len(entry["kept"]) for entry in rounds)
    lost: Counter[str] = Counter()
    for entry in made:
        lost.update(entry["dropped"])
    num_instances = sum(len(entry["instances"]) for entry in made)
    return {
        "rounds": len(rounds),
        "instructions": {"proposed": kept + dropped.total(), "kept": kept, "dropped": dict(dropped.most_common())},
        "kinds": {
            "classification": sum(entry["is_classification"] is True for entry in kinds),
            "other": sum(entry["is_classification"] is False for entry in kinds),
            "undecided (taken as other)": sum(entry["is_classification"] is None for entry in kinds),
        },
        "instances": {"made": num_instances + lost.total(), "kept": num_instances, "dropped": dict(lost.most_common())},
        "tasks": {"with instances": len(tasks), "dropped without one": len(made) - len(tasks)},
    }


def _check(seeds: Sequence[Task], config: SelfInstructConfig) -> None:
    for kind, name in ((True, "classification"), (False, "other")):
        if not any(seed.is_classification is kind for seed in seeds):
            raise DataError(f"Self-Instruct needs seed tasks of both kinds, there is no {name} one; add some")
    if len(seeds) < config.human_examples:
        raise DataError(f"Self-Instruct shows {config.human_examples} seed tasks, got {len(seeds)}; add some")


def _seeds_hash(seeds: Sequence[Task]) -> str:
    digest = hashlib.sha256()
    for seed in seeds:
        digest.update(_task_line(seed).encode())
    return digest.hexdigest()
