"""A server under steady load for ten minutes: nothing fails, and its memory stays flat. With the fake engine, so that
what is measured is ours and not a model's.

    python bench/serve_soak.py [--minutes 10] [--clients 16]

Clients chat, stream, stop in the middle, upload, list, delete, store and embed. After a warm-up of a tenth of the time
the server's resident memory is read every few seconds; it may not grow by more than `GROWTH` from the first third of
these readings to the last. Exit code 1 if it does, or if any answer was not what it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import httpx2

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests" / "serve"
CHAT = "/chat/completions"
GROWTH = 0.05  # of the median of the first third
HELLO = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16)
    args = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from fake_server import free_port  # type: ignore[import-not-found]

    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TESTS / "fake_server.py"), folder, str(port), "60"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                key = server.stdout.readline().strip()
                return asyncio.run(soak(server.pid, f"http://127.0.0.1:{port}/v1", key, args))
            finally:
                server.terminate()


async def soak(pid: int, base: str, key: str, args: argparse.Namespace) -> int:
    until = time.monotonic() + 60 * args.minutes
    limits = httpx2.Limits(max_connections=args.clients)
    done: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    headers = {"authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=base, headers=headers, timeout=120, limits=limits) as client:
        await until_it_answers(client)
        work = [work_on(client, random.Random(number), until, done, wrong) for number in range(args.clients)]
        readings, *_ = await asyncio.gather(watch(pid, args.minutes, until), *work)
    third = max(1, len(readings) // 3)
    first, last = median(readings[:third]), median(readings[-third:])
    growth = last / first - 1
    total = sum(done.values())
    print(f"{total:,} requests in {args.minutes:g} minutes: {dict(done)}")
    print(f"wrong: {dict(wrong) or 'none'}")
    print(f"resident memory: {first / 1e6:.1f} MB in the first third, {last / 1e6:.1f} MB in the last, {growth:+.1%}")
    return 1 if wrong or growth > GROWTH else 0


async def until_it_answers(client: httpx2.AsyncClient) -> None:
    for _ in range(600):
        try:
            if (await client.get("/models")).status_code == 200:
                return
        except httpx2.ConnectError:
            await asyncio.sleep(0.1)
    raise SystemExit("the server did not start")


async def watch(pid: int, minutes: float, until: float) -> list[int]:
    """Resident bytes of the server, read about two hundred times after the warm-up."""
    await asyncio.sleep(6 * minutes)
    readings = []
    while time.monotonic() < until:
        readings.append(resident_bytes(pid))
        await asyncio.sleep(0.27 * minutes)
    return readings or [resident_bytes(pid)]


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def work_on(
    client: httpx2.AsyncClient, draw: random.Random, until: float, done: Counter[str], wrong: Counter[str]
) -> None:
    kinds = (chat, stream, stop, store, upload, embed)
    while time.monotonic() < until:
        kind = draw.choice(kinds)
        try:
            complaint = await kind(client)
        except httpx2.HTTPError as error:
            complaint = type(error).__name__
        done[kind.__name__] += 1
        if complaint:
            wrong[f"{kind.__name__}: {complaint}"] += 1


async def chat(client: httpx2.AsyncClient) -> str:
    return told(await client.post(CHAT, json=HELLO))


async def stream(client: httpx2.AsyncClient) -> str:
    answer = await client.post(CHAT, json={**HELLO, "stream": True})
    return told(answer) or ("" if answer.text.endswith("data: [DONE]\n\n") else "a stream without an end")


async def stop(client: httpx2.AsyncClient) -> str:
    """Read a little and go away."""
    async with client.stream("POST", CHAT, json={**HELLO, "stream": True}) as answer:
        async for _ in answer.aiter_bytes():
            break
        return "" if answer.status_code == 200 else str(answer.status_code)


async def store(client: httpx2.AsyncClient) -> str:
    made = await client.post(CHAT, json={**HELLO, "store": True})
    listed = await client.get(CHAT, params={"limit": 5})
    gone = await client.delete(f"{CHAT}/{made.json().get('id')}")
    return told(made) or told(listed) or told(gone)


async def upload(client: httpx2.AsyncClient) -> str:
    made = await client.post("/files", files={"file": ("a", os.urandom(50_000))}, data={"purpose": "batch"})
    gone = await client.delete(f"/files/{made.json().get('id')}")
    return told(made) or told(gone)


async def embed(client: httpx2.AsyncClient) -> str:
    return told(await client.post("/embeddings", json={"model": "fake", "input": ["a", "b"]}))


def told(answer: httpx2.Response) -> str:
    return "" if answer.status_code == 200 else f"{answer.status_code} {answer.text[:100]}"


if __name__ == "__main__":
    sys.exit(main())
