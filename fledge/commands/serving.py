"""What the commands around the server share: where it keeps its state, and its moderation model."""

from __future__ import annotations

import os
from pathlib import Path

from fledge.store.database import sqlite_url


def server_folder() -> Path:
    """FLEDGE_HOME/server, by default below ~/.cache/fledge."""
    home = os.environ.get("FLEDGE_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "fledge") / "server"


def moderation_folder(name: str, runs: Path) -> Path | None:
    """The folder of a moderation model: a path, or a run of `fledge moderation train`; None if there is none."""
    for folder in (Path(name), Path(name) / "moderation", runs / name / "moderation"):
        if (folder / "classifier.json").is_file():
            return folder.resolve()
    return None


def database_url() -> str:
    """FLEDGE_DATABASE_URL, or the SQLite file of the server's folder."""
    return os.environ.get("FLEDGE_DATABASE_URL") or sqlite_url(server_folder() / "fledge.db")
