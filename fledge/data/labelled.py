"""Texts with labels, for training and measuring a moderation model, and the user's own ones: JSON lines

    {"text": "...", "labels": {"hate": false, "violence": true}, "group": "optional", "id": "optional"}

A category that is not among a text's labels was not judged. A line in any language counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fledge.data.jsonl import USER_LICENCE
from fledge.data.reading import lines
from fledge.errors import DataError, nearest
from fledge.types import Provenance


@dataclass(frozen=True)
class LabelledText:
    """A text and what is known of it: `labels[category]` says whether it holds; one that is not there was not judged.

    Texts of one `group` (answers to one prompt) never stand on both sides of a split. `judge` says who labelled:
    people, a model, or "selection": the text was chosen, by whoever made the source, as an example of the category.
    """

    text: str
    labels: Mapping[str, bool]
    group: str
    judge: Literal["people", "model", "selection"]
    provenance: Provenance


def labelled(path: Path, categories: Sequence[str]) -> Iterator[LabelledText]:
    """The texts of a file; `DataError` naming the line for one that is none, or for an unknown category."""
    for number, line in lines(path):
        where = f"{path}, line {number}"
        try:
            row: Any = json.loads(line)
            text, labels = row["text"], row["labels"]
            is_fit = isinstance(text, str) and bool(text.strip()) and all(isinstance(v, bool) for v in labels.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            is_fit = False
        if not is_fit:
            raise DataError(f'{where}: expected {{"text": "...", "labels": {{"hate": true}}}}; mend or drop the line')
        for name in labels:
            if name not in categories:
                raise DataError(f"{where}: no category '{name}'; {nearest(name, categories)}")
        identity = str(row.get("id", f"{path.name}:{number}"))
        group = str(row.get("group", text))
        yield LabelledText(text, labels, group, "people", Provenance("labelled", identity, USER_LICENCE))
