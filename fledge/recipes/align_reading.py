"""The stage `data` of an alignment run: files of any format read, rows that cannot be used refused or counted, split by
prompt, and left as JSON lines for the stages after it (align_data.py).

A row that a converter would fail on later is refused here, with its file and line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fledge.config import to_json
from fledge.data.feedback import FeedbackExample, prompt_of
from fledge.data.interchange import read
from fledge.data.pii import Taken, redacted, without_pii
from fledge.data.prompt_split import Sides, family_text, require_disjoint, split_by_prompt, without_common_prefixes
from fledge.data.reading import Drops
from fledge.data.records import LINE_SUFFIXES, BadRow, Intake
from fledge.errors import DataError, UserError
from fledge.files import write_text
from fledge.recipes.align_data import (
    CONVERTERS,
    HELD_OUT,
    SAFETY_HELD_OUT,
    SAFETY_TRAIN,
    TRAIN,
    Cut,
    cut_of,
    mixes_texts,
    verdicts,
)
from fledge.recipes.align_models import Context, start_of
from fledge.recipes.align_plan import DataPlan
from fledge.recipes.report import Fact, Licence, Table
from fledge.types import Conversation, PromptExample, TextExample


@dataclass
class TurnedAway:
    """What is not learned from, or not as it was: bad rows, rows with personal data, and how many rows had prompts
    that begin like another's."""

    bad: Drops = field(default_factory=Drops)
    personal: Taken = field(default_factory=Taken)
    prefixes: int = 0
    answers: dict[Conversation, str] = field(default_factory=dict)  # what a verifier compares with, by prompt


def data_stage(context: Context) -> None:
    """Read, refuse or count what cannot be used, split by prompt, write `train.jsonl` and `held_out.jsonl`."""
    plan = context.plan.data
    cut = cut_of(context, start_of(context).renderer)
    turned_away = TurnedAway()
    found = [example for path in plan.paths for example in _usable(Path(path), context, cut, turned_away)]
    if plan.prefix_chars is not None:
        found, turned_away.prefixes = without_common_prefixes(found, prefix_chars=plan.prefix_chars)
    if plan.held_out is None:
        sides = split_by_prompt(found, share=plan.held_out_share)
    else:
        others = tuple(_usable(Path(plan.held_out), context, cut, turned_away))
        require_disjoint(found, others, names=("--data", "--held-out"))
        sides = Sides(tuple(found), others, 0, 0)
    for name, side in ((TRAIN, sides.train), (HELD_OUT, sides.validation)):
        if not side:
            rows = _usable_rows(found, turned_away, plan)
            raise DataError(
                f"{', '.join(plan.paths)}: {rows} leave none for '{name.replace('_', ' ')}' "
                f"(prompts are split by their hash, {plan.held_out_share:.0%} held out); bring more, raise "
                "data.held_out_share, or give --held-out"
            )
        if (complaint := _unfit(context.plan.method, side, cut, is_learned=name == TRAIN)) is not None:
            raise DataError(f"{', '.join(plan.paths)}, {name.replace('_', ' ')}: {complaint}")
        _write_side(context, name, side)
    demonstrations = [example for path in plan.safety for example in _usable(Path(path), context, cut, turned_away)]
    if plan.held_out is not None:
        require_disjoint(demonstrations, sides.validation, names=("--safety", "--held-out"))
    # The split follows from the prompt alone, so a prompt that is held out there is held out here.
    apart = split_by_prompt(demonstrations, share=plan.held_out_share)
    _write_side(context, SAFETY_TRAIN, apart.train)
    _write_side(context, SAFETY_HELD_OUT, apart.validation)
    _report(context, sides, apart, turned_away)


def _unfit(method: str, side: Sequence[FeedbackExample], cut: Cut, *, is_learned: bool) -> str | None:
    """What one row alone does not show: KTO compares with answers to other prompts, and learns from both kinds."""
    if method != "kto":
        return None
    found = [verdict for example in side for verdict in verdicts(example, cut)]
    if len({prompt for prompt, _, _ in found}) < 2:
        return f"{len(found)} answers to one prompt; KTO compares them with answers to others: bring more prompts"
    kinds = Counter(is_good for _, _, is_good in found)
    if is_learned and len(kinds) < 2:
        return f"{kinds[True]} answers found good and {kinds[False]} found bad; KTO learns from both: bring the others"
    return None


def _usable_rows(found: Sequence[FeedbackExample], turned_away: TurnedAway, plan: DataPlan) -> str:
    """How many rows there are, of how many prompts that the split tells apart, and how many more there were."""
    prompts = len({family_text(prompt_of(example)) for example in found})
    others = {
        "skipped": sum(turned_away.bad.counts.values()),
        "with personal data left out": turned_away.personal.examples if plan.personal == "drop" else 0,
        "whose prompts begin like others left out": turned_away.prefixes,
    }
    return ", ".join(
        [f"{len(found)} usable rows of {prompts} prompts", *(f"{n} {why}" for why, n in others.items() if n)]
    )


def _write_side(context: Context, name: str, side: Sequence[FeedbackExample]) -> None:
    lines = (json.dumps({"kind": type(e).__name__, "example": to_json(e)}, ensure_ascii=False) for e in side)
    write_text(context.path / f"{name}.jsonl", "".join(line + "\n" for line in lines))


def _usable(path: Path, context: Context, cut: Cut, turned_away: TurnedAway) -> Iterator[FeedbackExample]:
    """The examples of a file that the method can learn from."""
    plan: DataPlan = context.plan.data
    intake = Intake(bad=turned_away.bad if plan.skip_bad else None, max_chars=plan.max_chars)
    convert = CONVERTERS[context.plan.method]
    found: Iterable[FeedbackExample] = read(path, intake, name=plan.format)
    if plan.personal != "keep":
        found = (redacted if plan.personal == "redact" else without_pii)(found, turned_away.personal)
    for example in found:
        try:
            if not (isinstance(example, TextExample) and mixes_texts(context.plan)):
                convert(example, cut)
            _refuse_another_answer(example, turned_away.answers)
        except UserError as why:
            reason, _, detail = str(why).partition(": ")
            intake.turn_away(BadRow(reason, _place(path, example), detail or reason))
            continue
        yield example


def _refuse_another_answer(example: FeedbackExample, answers: dict[Conversation, str]) -> None:
    """A prompt is asked once, so it can have one right answer only."""
    if isinstance(example, PromptExample) and example.answer is not None:
        first = answers.setdefault(example.prompt, example.answer)
        if first != example.answer:
            raise DataError(
                f"two answers: its prompt stood before with {first[:80]!r}, here it is {example.answer[:80]!r}; "
                "mend or drop the row"
            )


def _place(path: Path, example: FeedbackExample) -> str:
    """Where in the file an example stands: its line or row, or the name it has there."""
    name, _, number = example.provenance.id.rpartition(":")
    if name != path.name or not number.isdigit():
        return f"{path}, {example.provenance.id}"
    return f"{path}, {'line' if path.name.lower().endswith(LINE_SUFFIXES) else 'row'} {number}"


def _report(
    context: Context, sides: Sides[FeedbackExample], safety: Sides[FeedbackExample], turned_away: TurnedAway
) -> None:
    plan, drops = context.plan.data, turned_away.bad
    everything = (*sides.train, *sides.validation, *safety.train, *safety.validation)
    sources = Counter((e.provenance.source, e.provenance.licence) for e in everything)
    skipped = [(reason, count, drops.first[reason]) for reason, count in drops.counts.most_common()]
    note = "A prompt's side follows from a hash of how it begins: no answer to a training prompt is held out."
    split = [(TRAIN, len(sides.train)), ("held out", len(sides.validation))]
    facts = [Fact("rows skipped", sum(drops.counts.values())), Fact("prompts", sides.num_prompts or None)]
    if plan.personal != "keep":
        done = {"redact": "replaced", "drop": "left out"}[plan.personal]
        facts.append(Fact(f"rows with personal data, {done}", turned_away.personal.examples))
    if plan.prefix_chars is not None:
        facts.append(Fact("rows left out, whose prompts begin like others", turned_away.prefixes))
    if plan.safety:
        split += [("safety, train", len(safety.train)), ("safety, held out", len(safety.validation))]
    context.report = replace(
        context.report,
        headline=Fact("rows", len(everything)),
        facts=tuple(facts),
        tables=(
            Table.of("Split by prompt", ("side", "rows"), split, note),
            Table.of("Rows that could not be used", ("reason", "rows", "first"), skipped),
        ),
        licences=tuple(
            Licence(source, licence, count, used_for=context.plan.method)
            for (source, licence), count in sorted(sources.items())
        ),
    )
