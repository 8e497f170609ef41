"""What breaks around a server: a locked database, a full disk, slow and vanished clients, many of them, its own end.

Over a real socket where the socket is the matter. `kill -9` under load is in test_serve_kill.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_server import free_port, listening
from serve_fakes import FakeEngine, serving

from fledge.store import database as databases

CHAT = "/v1/chat/completions"
HELLO = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def request_bytes(key: str, **more: Any) -> bytes:
    body = json.dumps({**HELLO, **more}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    return head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body


def connect(base: str) -> socket.socket:
    host, port = base.removeprefix("http://").removesuffix("/v1").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def wait_until(holds: Any, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)


# The store.


@pytest.mark.anyio
async def test_a_locked_database_is_a_503_and_answers_that_need_none_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "BUSY_SECONDS", 0.2)
    async with serving(tmp_path) as server, server.client() as client:
        assert (await client.get("/v1/models")).status_code == 200
        connect = functools.partial(sqlite3.connect, isolation_level=None, check_same_thread=False, timeout=30)
        with contextlib.closing(connect(tmp_path / "fledge.db")) as other:
            await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")  # the server's own writers end meanwhile
            upload = {"file": ("a", b"{}")}
            refused = await client.post("/v1/files", files=upload, data={"purpose": "batch"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
            assert int(refused.headers["retry-after"]) >= 1
            assert (await client.post(CHAT, json=HELLO)).status_code == 200
            assert (await client.get("/v1/files")).status_code == 200
            other.execute("ROLLBACK")
        assert (await client.post("/v1/files", files=upload, data={"purpose": "batch"})).status_code == 200


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.anyio
async def test_a_full_disk_refuses_an_upload_and_loses_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        async with serving(disk) as server, server.client() as client:
            small = await client.post("/v1/files", files={"file": ("a", b"kept")}, data={"purpose": "batch"})
            large = {"file": ("b", os.urandom(8 << 20))}
            refused = await client.post("/v1/files", files=large, data={"purpose": "batch"})
            assert refused.status_code == 503, refused.text
            assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
            left = [path for path in server.state.blobs.root.rglob("*") if path.is_file()]
            assert len(left) == 1, "half an upload was kept"
            assert (await client.get(f"/v1/files/{small.json()['id']}/content")).content == b"kept"
            assert (await client.post(CHAT, json=HELLO)).status_code == 200
            again = await client.post("/v1/files", files={"file": ("c", b"more")}, data={"purpose": "batch"})
            assert again.status_code == 200


# Clients.


@pytest.mark.slow
def test_20_five_hundred_open_streams_are_served_and_their_going_frees_all(tmp_path: Path) -> None:
    engine = FakeEngine("q" * 200)
    engine.gate_place = 3
    with listening(tmp_path, engine) as (server, base):
        engine.gate = asyncio.Event()
        connections = [connect(base) for _ in range(500)]
        for connection in connections:
            connection.sendall(request_bytes(server.keys["alice"], stream=True))
        wait_until(lambda: len(engine.live) == 500, 120)
        for connection in connections:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        assert httpx2.get(base.removesuffix("/v1") + "/health", timeout=30).status_code == 200
        for connection in connections:
            connection.close()
        wait_until(lambda: not engine.live, 120)
        assert server.state.jobs.num_running == 0
        assert len(engine.cancelled) == 500


@pytest.mark.slow
def test_20_a_reader_that_is_slow_holds_up_nobody_else(tmp_path: Path) -> None:
    engine = FakeEngine("q" * 3000)
    with listening(tmp_path, engine) as (server, base):
        slow = connect(base)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(request_bytes(server.keys["alice"], stream=True))
        slow.recv(100)  # and no more
        began = time.monotonic()
        headers = {"authorization": f"Bearer {server.keys['bob']}"}
        for _ in range(3):
            answer = httpx2.post(f"{base}/chat/completions", json=HELLO, headers=headers, timeout=60)
            assert answer.status_code == 200
        assert time.monotonic() - began < 30
        slow.close()
        wait_until(lambda: server.state.jobs.num_running == 0)


@pytest.mark.slow
def test_20_requests_that_never_end_are_not_worked_on(tmp_path: Path) -> None:
    """Slow-loris: half a head, half a body; others are answered meanwhile."""
    with listening(tmp_path) as (server, base):
        key = server.keys["alice"]
        halves = []
        for cut in (20, len(request_bytes(key)) - 5):
            for _ in range(50):
                connection = connect(base)
                connection.sendall(request_bytes(key)[:cut])
                halves.append(connection)
        headers = {"authorization": f"Bearer {key}"}
        assert httpx2.post(f"{base}/chat/completions", json=HELLO, headers=headers, timeout=60).status_code == 200
        assert len(server.engine.requests) == 1
        for connection in halves:
            connection.close()


# Its own end.


@pytest.mark.slow
def test_sigterm_lets_answers_in_progress_end_and_takes_no_more(tmp_path: Path) -> None:
    port = free_port()
    here = Path(__file__).parent
    command = [sys.executable, str(here / "draining_server.py"), str(tmp_path), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            key = server.stdout.readline().strip()
            base = f"http://127.0.0.1:{port}"
            wait_until(lambda: _answers(base), 120)
            headers = {"authorization": f"Bearer {key}"}
            body = {**HELLO, "stream": True}
            with httpx2.stream("POST", base + CHAT, json=body, headers=headers, timeout=60) as stream:
                lines = stream.iter_lines()
                first = next(lines)
                server.send_signal(signal.SIGTERM)
                rest = list(lines)
            assert first.startswith("data: ")
            assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
            assert server.wait(60) in (0, -signal.SIGTERM)  # uvicorn passes the signal on once all is done
            with pytest.raises(httpx2.ConnectError):
                httpx2.get(f"{base}/health")
        finally:
            server.kill()


def _answers(base: str) -> bool:
    try:
        return bool(httpx2.get(f"{base}/health", timeout=5).status_code == 200)
    except httpx2.HTTPError:
        return False


@pytest.mark.anyio
async def test_memory_does_not_grow_with_the_answers_that_were_given(tmp_path: Path) -> None:
    """Nothing of a finished request stays: as many objects of ours after 75 answers as after 50."""

    def count() -> int:
        gc.collect()
        return sum(str(type(one).__module__).startswith("fledge.") for one in gc.get_objects())

    counts = []
    async with serving(tmp_path) as server, server.client() as client:
        for number in range(75):
            assert (await client.post(CHAT, json={**HELLO, "stream": number % 2 == 0})).status_code == 200
            server.engine.requests.clear()  # the fake's own memory
            if number % 25 == 24:
                counts.append(count())
    assert counts[2] <= counts[1] + 5, counts
    assert server.state.jobs.num_running == 0
