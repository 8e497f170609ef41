"""The first token of a 200-token prompt while 16 streams run: over HTTP, and from the same engine without it.

    python bench/first_token.py [--streams 16] [--prompt 200] [--rounds 20] [--threads 2]

A model of 14 million parameters with random weights answers in the engine's own process. The app listens on a socket
in this process and is asked over it; the engine is then asked directly, under the same streams. The two take turns, so
that a busy machine disturbs both alike. The mark: under 100 ms, of which HTTP adds at most 5.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
import uvicorn
from latency_under_training import write_checkpoint

from fledge.serve.app import make_app, make_state
from fledge.serve.engine import ServedModel
from fledge.serve.hub import ModelEntry
from fledge.serve.loading import ProcessLoader
from fledge.serve.state import ServerConfig
from fledge.store.blobs import Blobs
from fledge.store.database import Database, sqlite_url
from fledge.store.keys import KeyRequest, create_key
from fledge.types import Request, SamplingParams

PORT = 8790
NUM_BYTES = 256  # every byte-level tokenizer has at least so many tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, help="of the engine (default: as many as torch takes)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), args))


async def measure(folder: Path, args: argparse.Namespace) -> None:
    async with serving(folder, args.threads) as (model, key):
        load = [asyncio.create_task(keep_running(model, i)) for i in range(args.streams)]
        await asyncio.sleep(2)
        http, direct = [], []
        for number in range(args.rounds):
            ids = prompt(number, args.prompt)
            http.append(await over_http(key, ids))
            direct.append(await from_engine(model, prompt(number + 10_000, args.prompt)))
        for task in load:
            task.cancel()
        await asyncio.gather(*load, return_exceptions=True)
    told = {"over HTTP": http, "from the engine": direct}
    for name, seconds in told.items():
        worst = sorted(seconds)[int(0.9 * len(seconds))]
        middle = statistics.median(seconds)
        print(f"first token {name:<16} {middle * 1e3:7.1f} ms at the median, {worst * 1e3:7.1f} at 90 %")
    print(f"HTTP adds                    {(statistics.median(http) - statistics.median(direct)) * 1e3:7.1f} ms")


@asynccontextmanager
async def serving(folder: Path, threads: int | None) -> AsyncIterator[tuple[ServedModel, str]]:
    write_checkpoint(folder / "model")
    database = Database(sqlite_url(folder / "fledge.db"))
    await database.open()
    key, _ = await create_key(database, KeyRequest("bench"))
    loader = ProcessLoader(num_threads=threads)
    own = [ModelEntry("bench", 0, "fledge", path=folder / "model")]
    state = make_state(ServerConfig(drain_seconds=1), database, Blobs(folder / "blobs"), loader, own)
    listener = uvicorn.Server(uvicorn.Config(make_app(state), port=PORT, log_config=None, access_log=False))
    running = asyncio.create_task(listener.serve())
    while not listener.started:
        await asyncio.sleep(0.05)
    async with state.hub.use("bench", "bench") as model:
        yield model, key
    listener.should_exit = True
    await running
    await database.close()


def prompt(seed: int, length: int) -> list[int]:
    """One that no other request begins like, so that the prefix cache does not help."""
    return torch.randint(10, NUM_BYTES, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


async def keep_running(model: ServedModel, number: int) -> None:
    """One stream after another."""
    while True:
        params = SamplingParams(max_tokens=700 + 37 * number, temperature=1.0, seed=number)  # not all end at once
        request = Request(uuid.uuid4().hex, tuple(prompt(number + 50_000, 32)), params, tenant="load")
        async for _ in model.engine.submit(request):
            pass


async def from_engine(model: ServedModel, ids: list[int]) -> float:
    request = Request(uuid.uuid4().hex, tuple(ids), SamplingParams(max_tokens=1), tenant="bench")
    began = time.perf_counter()
    async for _ in model.engine.submit(request):
        return time.perf_counter() - began
    raise AssertionError("no token")


async def over_http(key: str, ids: list[int]) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    body = json.dumps({"model": "bench", "prompt": ids, "max_tokens": 2, "stream": True, "temperature": 1}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    began = time.perf_counter()
    writer.write(head.encode() + body)
    said = b""
    while b'"text"' not in said and b"[DONE]" not in said:
        piece = await reader.read(1 << 16)
        assert piece, said
        said += piece
    seconds = time.perf_counter() - began
    await reader.read()
    writer.close()
    return seconds


if __name__ == "__main__":
    main()
