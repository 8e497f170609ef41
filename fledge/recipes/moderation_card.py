"""What the card of a moderation model says: precision and recall by category and script, what it learnt from, what it
cannot do."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fledge.data.labelled import LabelledText
from fledge.safety.categories import LEARNT, MIN_HELD_OUT, MINORS, SCRIPTS, script_of
from fledge.safety.classifier import Figures

_CANNOT = f"""## What it cannot do

- A category with fewer than {MIN_HELD_OUT} held-out positives in a script is **unmeasured** there: it gets a score and
  never flags. A text counts to the script that most of its letters are in.
- `{MINORS}` is never learnt: nobody writes an example of it and none is learnt from. Its score is 0 and it never flags.
- The labels are only in part people's: many texts were chosen by their sources as examples of a category, and others
  carry a public classifier's score. Figures against such labels say how well the selection was learnt.
- Precision holds for the mixture of texts measured here. Among ordinary texts positives are far rarer, and precision
  is lower; the share of harmless texts that are flagged, below, does not depend on the mixture.
- It is a small model: it knows words and short phrases better than meaning. Irony, quotations, code words, spellings
  meant to deceive, and what is harmful only in its context escape it.
- It was not measured on groups of speakers, and may flag dialects and words that a group uses of itself more often.
- It reads text only. It is an aid to people who decide, not a decision."""


def figures_of(
    texts: Sequence[LabelledText], scores_NK: NDArray[np.float64], thresholds: Mapping[str, float]
) -> dict[str, Figures]:
    """By category, over the texts of which it is known."""
    found = {}
    for k, name in enumerate(LEARNT):
        known = [
            (text.labels[name], scores_NK[n, k] >= thresholds[name])
            for n, text in enumerate(texts)
            if name in text.labels
        ]
        positives = sum(is_yes for is_yes, _ in known)
        flagged = sum(is_flagged for _, is_flagged in known)
        right = sum(is_yes and is_flagged for is_yes, is_flagged in known)
        precision = round(right / flagged, 4) if flagged and positives else None
        recall = round(right / positives, 4) if positives else None
        found[name] = Figures(positives, len(known) - positives, precision, recall)
    return found


def harmless_rates(
    texts: Sequence[LabelledText],
    scores_NK: NDArray[np.float64],
    thresholds: Mapping[str, float],
    figures: Mapping[str, Mapping[str, Figures]],
) -> dict[str, tuple[int, float]]:
    """By source and script of the harmless texts: how many there are, and the share that a measured category flags,
    counting those measured in Latin script for every script, so that it says what would happen there."""
    limits_K = np.array([thresholds[name] if figures["latin"][name].is_measured else 2.0 for name in LEARNT])
    flagged: dict[str, list[bool]] = defaultdict(list)
    for n, text in enumerate(texts):
        if len(text.labels) > 8 and not any(text.labels.values()):
            where = f"{text.provenance.source}, {script_of(text.text)}"
            flagged[where].append(bool((scores_NK[n] >= limits_K).any()))
    return {where: (len(found), sum(found) / len(found)) for where, found in sorted(flagged.items())}


def card_text(
    plan: Mapping[str, Any],
    held_out: Sequence[LabelledText],
    scores_NK: NDArray[np.float64],
    thresholds: Mapping[str, float],
    figures: Mapping[str, Mapping[str, Figures]],
) -> str:
    start = plan["start"]
    judges = Counter(text.judge for text in held_out if any(text.labels.values()))
    head = f"""# Moderation model: card

Trained by `fledge moderation train {start["name"]}` on the weights {start["hash"][:12]}, seed {plan["seed"]}; measured
on {len(held_out):,} held-out texts, whose prompts were not trained on ({plan["data"]["held_out_share"]:.0%} of all).
Of the positives, {judges["people"]} were labelled by people, {judges["selection"]} chosen by their source as examples,
{judges["model"]} scored by a public classifier.
"""
    rates = harmless_rates(held_out, scores_NK, thresholds, figures)
    harmless = "\n".join(f"| {where} | {count} | {share:.1%} |" for where, (count, share) in rates.items())
    sources = Counter((text.provenance.source, text.provenance.licence) for text in held_out)
    origins = "\n".join(f"| {name} | {licence} | {count} |" for (name, licence), count in sorted(sources.items()))
    return "\n".join(
        (
            head,
            *(_script_table(script, thresholds, figures[script]) for script in SCRIPTS),
            "## Harmless texts that would be flagged\n",
            f"| source, script | texts | flagged |\n|---|---|---|\n{harmless}\n",
            f"## What it learnt from\n\n| source | licence | held-out texts |\n|---|---|---|\n{origins}\n",
            _CANNOT,
            "",
        )
    )


_SCRIPT_NAMES = {"latin": "Latin script (English)", "han": "Chinese", "other": "Other scripts"}


def _script_table(script: str, thresholds: Mapping[str, float], figures: Mapping[str, Figures]) -> str:
    title = f"## {_SCRIPT_NAMES[script]}\n"
    if not any(one.positives for one in figures.values()):
        return f"{title}\nNo held-out positives: every category is unmeasured, and nothing written so is flagged.\n"
    rows = "\n".join(
        f"| {name} | {one.positives} | {one.negatives} | {thresholds[name]:.2f} | {_share(one.precision)} "
        f"| {_share(one.recall)} | {'measured' if one.is_measured else 'unmeasured, never flags'} |"
        for name, one in figures.items()
    )
    columns = "| category | positives | negatives | threshold | precision | recall | |\n|---|---|---|---|---|---|---|"
    return f"{title}\n{columns}\n{rows}\n| {MINORS} | 0 | 0 | | | | never learnt, never flags |\n"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
