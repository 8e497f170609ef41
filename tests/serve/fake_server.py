"""The app over the fake engine, behind a real socket: `python fake_server.py FOLDER PORT [LETTERS]`."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from serve_fakes import FakeEngine, FakeStream, Server, serving

from fledge.types import Request


def make_server(app: object, port: int) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, access_log=False, lifespan="off")  # type: ignore[arg-type]
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def listening(folder: Path, engine: FakeEngine | None = None) -> Iterator[tuple[Server, str]]:
    """A server in a thread of its own; gives it and its base URL."""
    port = free_port()
    ready: list[tuple[Server, uvicorn.Server]] = []

    async def run() -> None:
        async with serving(folder, engine=engine) as server:
            listener = make_server(server.app, port)
            server.loop = asyncio.get_running_loop()
            ready.append((server, listener))
            await listener.serve()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    while not ready or not ready[0][1].started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield ready[0][0], f"http://127.0.0.1:{port}/v1"
    finally:
        ready[0][1].should_exit = True
        thread.join()


class Forgetful(FakeEngine):
    """Remembers the last requests only: over hours its own memory would be what grows."""

    def submit(self, request: Request) -> FakeStream:
        for log in (self.requests, self.cancelled):
            del log[:-100]
        return super().submit(request)


async def main(folder: Path, port: int, letters: int) -> None:
    """Prints the key; the engine says so many letters."""
    async with serving(folder, engine=Forgetful("q" * letters)) as server:
        print(server.keys["alice"], flush=True)  # noqa: T201
        await make_server(server.app, port).serve()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int((sys.argv[3:] or ["200"])[0])))
