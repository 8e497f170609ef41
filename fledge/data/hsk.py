"""4,354 graded Chinese sentences with their English translations (HSK 3.0), one pair a document.

Source: the PyPI package hsk-sentences-audio (code MIT, sentences CC BY-SA 4.0).
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
    "hsk-sentences-audio",
    "1.0.0",
    "hsk_sentences_audio-1.0.0-py3-none-any.whl",
    "9bf16cc7b48a24a10af83d377439d3c6f7571a380937f4645a1cd1590d5d0335",
)
LICENCE = "CC BY-SA 4.0"
MEMBER = "hsk_sentences_audio/data/sentences.json"


def examples(split: Split, *, cache: Path, seed: int) -> Iterator[TextExample]:
    yield from select(_sentences(cache), split, seed)


def _sentences(cache: Path) -> Iterator[TextExample]:
    for sentence in json.loads(member_text(PACKAGE, MEMBER, cache)):
        text = f"{sentence['chinese']}\n{sentence['translation']['en']}\n"
        yield TextExample(text, Provenance("hsk", sentence["id"], LICENCE))
