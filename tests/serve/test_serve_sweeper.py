"""Expired files go by themselves, with their content if nobody else has it; a locked database is tried again."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest
from serve_fakes import Server
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from fledge.serve import sweeper as sweeping
from fledge.serve.sweeper import Sweeper
from fledge.store.files import find_file
from fledge.store.pages import now
from fledge.store.tables import FileRow

pytestmark = pytest.mark.anyio


async def upload(server: Server, content: bytes, *, is_expiring: bool) -> str:
    data: dict[str, Any] = {"purpose": "batch"}
    if is_expiring:
        data |= {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    async with server.client() as client:
        made = await client.post("/v1/files", files={"file": ("a", content)}, data=data)
    return str(made.json()["id"])


async def let_an_hour_pass(server: Server) -> None:
    async with server.state.database.writing() as session:
        await session.execute(update(FileRow).where(FileRow.expires_at.is_not(None)).values(expires_at=now() - 1))


def kept(server: Server) -> int:
    return sum(path.is_file() for path in server.state.blobs.root.rglob("*"))


async def wait_for(done: Any) -> None:
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.01)


async def test_the_server_deletes_what_has_expired_and_only_that(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [await upload(server, b"shared", is_expiring=expires) for expires in (True, False)]
    await upload(server, b"alone", is_expiring=True)
    assert kept(server) == 2
    await let_an_hour_pass(server)
    sweeper = Sweeper(server.state.database, server.state.blobs, every=0.01)
    sweeper.open()
    try:
        await wait_for(lambda: kept(server) == 1)
    finally:
        await sweeper.close()
    assert await find_file(server.state.database, "alice", shared[0]) is None
    assert await find_file(server.state.database, "alice", shared[1]) is not None
    async with server.client() as client:
        assert (await client.get(f"/v1/files/{shared[1]}/content")).content == b"shared"


async def test_the_app_sweeps_from_its_start(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[Path] = []

    async def sweep(self: Sweeper) -> int:
        swept.append(self._blobs.root)
        return 0

    monkeypatch.setattr(sweeping.Sweeper, "sweep", sweep)
    async with server.app.router.lifespan_context(server.app):
        await wait_for(lambda: bool(swept))
    assert swept == [server.state.blobs.root]


async def test_a_database_that_is_locked_is_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    async def sweep_expired(*_: Any) -> int:
        nonlocal tries
        tries += 1
        raise OperationalError("", {}, Exception("database is locked"))

    monkeypatch.setattr(sweeping, "sweep_expired", sweep_expired)
    sweeper = Sweeper(server.state.database, server.state.blobs, every=0.001)
    sweeper.open()
    await wait_for(lambda: tries >= 3)
    await sweeper.close()


async def test_what_a_crash_left_of_an_upload_goes_after_a_day(server: Server) -> None:
    root = server.state.blobs.root
    root.mkdir(exist_ok=True)
    old, new = root / ".writing-old", root / ".writing-new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * sweeping.ABANDONED_SECONDS,) * 2)
    await Sweeper(server.state.database, server.state.blobs).sweep()
    assert (old.exists(), new.exists()) == (False, True)
