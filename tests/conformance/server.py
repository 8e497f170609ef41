"""The server that the client's tests run against: the fake engine, the seeds, and a second port that restores them.

python server.py FOLDER PORT CONTROL_PORT
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from fake_server import make_server
from seeds import ALIASES, MODERATOR, restore
from serve_fakes import FakeLoader, entries, word_moderator

from fledge.serve.app import make_app, make_state
from fledge.serve.guard import Limits
from fledge.serve.hub import ModelEntry
from fledge.serve.state import ServerConfig
from fledge.store.blobs import Blobs
from fledge.store.database import Database, sqlite_url


async def main(folder: Path, port: int, control_port: int) -> None:
    database, blobs = Database(sqlite_url(folder / "fledge.db")), Blobs(folder / "blobs")
    await database.open()
    own = [*entries("fake"), *(ModelEntry(name, 1_700_000_000, "fledge", target="fake") for name in ALIASES)]
    config = ServerConfig(Limits(max_wrong_keys=10**9), drain_seconds=0.1)
    state = make_state(config, database, blobs, FakeLoader(), own, moderator=word_moderator(name=MODERATOR))

    restoring = asyncio.Lock()

    async def on_control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with restoring:
            await restore(database, blobs)
        writer.write(b"restored")
        writer.close()

    app = make_app(state)
    await restore(database, blobs)
    async with (
        app.router.lifespan_context(app),
        await asyncio.start_server(on_control, "127.0.0.1", control_port),
    ):
        await make_server(app, port).serve()
    await database.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
