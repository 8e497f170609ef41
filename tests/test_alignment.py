"""docs/alignment.md against the tests: every criterion has tests of its number, every task the tests that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "alignment.md").read_text(encoding="utf-8")


def rows_of(part: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    text = PAGE.split(f"## {part}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip().strip("|").split("|")] for line in lines[2:]]


CRITERIA, TASKS = rows_of("Sixty criteria"), rows_of("Tiny tasks")


def defined_in(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))


def numbers_of(test: str) -> set[int]:
    """The criteria whose numbers a test's name begins with."""
    match = re.match(r"test_((?:c\d+_)+)", test)
    return {int(number) for number in re.findall(r"c(\d+)_", match[1])} if match else set()


@pytest.mark.parametrize("row", CRITERIA, ids=lambda row: f"{row[0]} {row[2]}")
def test_criterion_is_held_by_a_test_that_bears_its_number(row: list[str]) -> None:
    criterion, _, test, file = row
    assert test in defined_in(file)
    assert int(criterion.removeprefix("C")) in numbers_of(test)


def test_all_sixty_criteria_are_listed_in_order_and_say_what_holds() -> None:
    numbers = [int(row[0].removeprefix("C")) for row in CRITERIA]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(1, 61))
    assert {number for number, row in zip(numbers, CRITERIA, strict=True) if row[1]} == set(numbers)


@pytest.mark.parametrize("row", TASKS, ids=lambda row: row[0])
def test_task_is_held_by_the_test_that_the_page_names(row: list[str]) -> None:
    *_, test, file = row
    assert test in defined_in(file)
