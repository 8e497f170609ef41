"""Files are whole or absent: after a crash, on a full disk, where nothing may be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fledge import files
from fledge.errors import RunError


def full_disk(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "note.json"
    files.write_json(path, {"a": [1, "字"]})
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["note.json"]


def test_a_full_disk_is_told_by_name_and_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old")
    monkeypatch.setattr(files, "sync", full_disk)
    with pytest.raises(RunError, match=r"note\.txt: the disk is full; nothing was overwritten"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_a_full_disk_leaves_a_directory_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model"
    files.write_directory(path, lambda folder: (folder / "weights").write_text("old"))

    def fill(folder: Path) -> None:
        (folder / "weights").write_text("ne")
        full_disk(folder / "weights")

    with pytest.raises(RunError, match="the disk is full"):
        files.write_directory(path, fill)
    assert (path / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    files.write_directory(path, lambda folder: (folder / "a").write_text("1"))
    files.write_directory(path, lambda folder: (folder / "b").write_text("2"))
    assert os.listdir(path) == ["b"]
    assert os.listdir(tmp_path) == ["model"]


def test_an_interrupted_write_leaves_no_trace(tmp_path: Path) -> None:
    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_file(tmp_path / "a", stop)
    with pytest.raises(KeyboardInterrupt):
        files.write_directory(tmp_path / "b", stop)
    assert os.listdir(tmp_path) == []


def test_a_place_that_is_no_folder_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        files.write_text(tmp_path / "file" / "note.txt", "text")
