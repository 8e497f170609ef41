"""Journals: whole lines survive, a broken last line does not, and work of another kind is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.errors import RunError
from fledge.synth.journal import Journal, open_journal


def test_a_line_that_was_cut_off_anywhere_is_written_again_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "deep/work.jsonl"
    with Journal(path, {"seed": 1}) as journal:
        journal.append({"n": 0, "text": "天"})
        journal.append({"n": 1})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with Journal(path, {"seed": 1}) as journal:
            kept = len(journal.entries)
            for n in range(kept, 2):
                journal.append([{"n": 0, "text": "天"}, {"n": 1}][n])
        assert path.read_bytes() == whole
        assert kept == max(0, whole[:length].count(b"\n") - 1)


def test_work_of_another_kind_and_damaged_lines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    with Journal(path, {"seed": 1, "size": 3}) as journal:
        journal.append({"n": 0})
    with pytest.raises(RunError, match=r"other work \(seed differ"):
        Journal(path, {"seed": 2, "size": 3})
    path.write_text('{"seed": 1}\n{"n": \n{"n": 1}\n')
    with pytest.raises(RunError, match="damaged"):
        Journal(path, {"seed": 1})


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    with open_journal(None, {"seed": 1}) as journal:
        journal.append({"n": 0})
        assert journal.entries == [{"n": 0}]
    assert list(tmp_path.iterdir()) == []
