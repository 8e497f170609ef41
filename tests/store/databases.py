"""Databases for tests: SQLite always, PostgreSQL where its programs are there."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def programs() -> Path | None:
    """Where `initdb` and `pg_ctl` are: on the path, or where Debian puts them."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return places[-1].parent if places else None


@contextmanager
def postgres(port: int = 54329) -> Iterator[str]:
    """A server of its own in a temporary folder, reached by a socket there; its URL. Skips the test without one."""
    where = programs()
    if where is None:
        pytest.skip("PostgreSQL is not installed (initdb, pg_ctl)")
    folder = Path(tempfile.mkdtemp(prefix="fledge-pg-"))
    # Its programs refuse to run as root; then a user that everybody has runs them.
    as_user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.getuid() == 0 else []
    if as_user:
        shutil.chown(folder, "nobody", "nogroup")
    data = folder / "data"

    def call(program: str, *arguments: str) -> None:
        command = [*as_user, str(where / program), "-D", str(data), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=120)
        if done.returncode:
            pytest.skip(f"PostgreSQL does not run here: {done.stderr.strip()[-200:]}")

    try:
        call("initdb", "-U", "fledge", "--auth=trust", "-N")
        options = f"-k {folder} -p {port} -c listen_addresses='' -c fsync=off"
        call("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql://fledge@/postgres?host={folder}&port={port}"
        finally:
            call("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
