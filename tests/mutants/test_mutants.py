"""The catalogue of mutants fits the code, and the table in docs/alignment.md is that of this catalogue (C60)."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import mutate
import pytest
from mutant import Mutant, MutantError
from mutants import CATALOGUE
from mutants_c60 import C60

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", CATALOGUE, ids=lambda mutant: mutant.name)
def test_c60_mutant_fits_the_code_and_parses(mutant: Mutant) -> None:
    mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))


def test_c60_catalogue_has_the_listed_bugs_and_thirty_more_with_names_of_their_own() -> None:
    assert len(C60) >= 9
    assert len(CATALOGUE) - len(C60) >= 30
    assert max(Counter(mutant.name for mutant in CATALOGUE).values()) == 1
    folders = {"/".join(mutant.file.split("/")[:2]) for mutant in CATALOGUE}
    assert {"fledge/rl", "fledge/objectives", "fledge/text"} <= folders


def test_c60_table_of_the_page_has_every_mutant_and_no_survivor() -> None:
    page = mutate.PAGE.read_text(encoding="utf-8")
    table = page.split(mutate.BEGIN)[1].split(mutate.END)[0]
    listed = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert listed == [mutant.name for mutant in CATALOGUE], "run `make mutants`: it writes this table"
    assert "survived" not in table


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [("b = 2", "b = 3", "occurs 0 times"), ("a", "b", "occurs 2 times"), ("c = 1", "c = (", "no longer parses")],
)
def test_mutant_that_does_not_fit_is_an_error(old: str, new: str, complaint: str) -> None:
    with pytest.raises(MutantError, match=complaint):
        Mutant("name", "file.py", old, new, "what").apply("a = 1\nc = 1\na = 2\n")


def test_mutant_that_changes_nothing_is_an_error() -> None:
    with pytest.raises(MutantError, match="changes nothing"):
        Mutant("name", "file.py", "a = 1", "a = 1", "what").apply("a = 1\n")


def test_tests_of_the_mutated_file_run_first_and_all_run() -> None:
    own, rest = mutate.order_of("fledge/rl/reward.py")
    assert own == ["tests/rl/test_rl_reward.py"]
    assert len(rest) == len({*rest} - {*own}) > 25
    folders = [Path(path).parent.name for path in rest]
    assert folders == sorted(folders, key=["rl", "objectives", "text"].index), "its own folder before the others"
    assert mutate.order_of("fledge/text/chat.py")[0] == ["tests/text/test_text_chat.py"]
    (everything,) = mutate.order_of("fledge/layers/attention.py")
    assert {*everything} == {*own, *rest}


def test_table_keeps_the_rows_that_a_run_said_nothing_of(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        f"before\n{mutate.BEGIN}\nold\n| gone | a | b | c | 1 | 1 |\n{mutate.END}\nafter\n", encoding="utf-8"
    )
    first, second, *_ = CATALOGUE
    mutate.write_table(page, [mutate.Outcome(second, None, 0, 9.0)])
    mutate.write_table(page, [mutate.Outcome(first, "tests/rl/test_rl_kl.py::test_x[a|b]", 7, 2.4)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{mutate.BEGIN}\n1 of 2 caught; half of them by the 7th ")
    assert text.endswith(f"{mutate.END}\nafter\n")
    file = first.file.removeprefix("fledge/")
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert rows[0] == f"| {first.name} | `{file}` | {first.what} | `test_x[a\\|b]` | 7 | 2 |"
    assert [row.split(" | ")[3] for row in rows[1:]] == ["**survived**"]


def test_command_lists_the_catalogue_and_refuses_an_unknown_name() -> None:
    command = [sys.executable, str(Path(mutate.__file__))]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == len(CATALOGUE)
    unknown = subprocess.run([*command, "--only", "nothing"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 1
    assert "no mutant is called nothing" in unknown.stderr
