"""A server whose fake engine says what a request's format asks for: what the npm client and the quick starts talk to.

python speaking.py FOLDER PORT    prints the key
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fake_server import listening, make_server
from serve_fakes import FakeEngine, Server, serving, tokenizer

from fledge.store.models import register_model
from fledge.types import Request

VERDICT = '{"answer": "tea", "sure": true}'
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


class SpeakingEngine(FakeEngine):
    """A verdict where a schema is asked for, a call where tools must be used, else its text."""

    def ids_for(self, request: Request) -> list[int]:
        text = self.text
        if request.grammar is not None:
            text = CALL if request.grammar.kind == "lark" else VERDICT
        ids = tokenizer().encode(text)
        return [*ids, *sorted(request.stop_ids)[:1]][: request.params.max_tokens]


async def name_models(server: Server) -> None:
    """What the pages call the model."""
    await register_model(server.state.database, "pocket", owner=None, path="fake")


@contextmanager
def speaking(folder: Path) -> Iterator[tuple[str, str]]:
    """The server in a thread of its own; its base URL and a key."""
    with listening(folder, SpeakingEngine()) as (server, url):
        future = asyncio.run_coroutine_threadsafe(name_models(server), server.loop)
        future.result()
        yield url, server.keys["alice"]


async def main(folder: Path, port: int) -> None:
    async with serving(folder, engine=SpeakingEngine()) as server:
        await name_models(server)
        print(server.keys["alice"], flush=True)  # noqa: T201
        await make_server(server.app, port).serve()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
