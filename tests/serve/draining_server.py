"""The app over a slow fake engine, opened and closed as `fledge serve` does: `python draining_server.py DIR PORT`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvicorn
from serve_fakes import FakeEngine, FakeLoader, entries

from fledge.serve.app import make_app, make_state
from fledge.serve.state import ServerConfig
from fledge.store.blobs import Blobs
from fledge.store.database import Database, sqlite_url
from fledge.store.keys import KeyRequest, create_key


async def main(folder: Path, port: int) -> None:
    """Prints the key."""
    engine = FakeEngine("A long answer, a word at a time. " * 3)
    engine.delay_seconds = 0.02
    database = Database(sqlite_url(folder / "fledge.db"))
    await database.open()
    config = ServerConfig(drain_seconds=20.0)
    app = make_app(make_state(config, database, Blobs(folder / "blobs"), FakeLoader(engine), entries("fake")))
    key, _ = await create_key(database, KeyRequest("alice"))
    print(key, flush=True)  # noqa: T201
    settings = uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, timeout_graceful_shutdown=20)
    await uvicorn.Server(settings).serve()
    await database.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
