"""What `serve` and `keys` share: where a server keeps its state."""

from __future__ import annotations

import os
from pathlib import Path

from fledge.store.database import sqlite_url


def server_folder() -> Path:
    """FLEDGE_HOME/server, by default below ~/.cache/fledge."""
    home = os.environ.get("FLEDGE_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "fledge") / "server"


def database_url() -> str:
    """FLEDGE_DATABASE_URL, or the SQLite file of the server's folder."""
    return os.environ.get("FLEDGE_DATABASE_URL") or sqlite_url(server_folder() / "fledge.db")
