"""Jobs and their logs: reading on, being forgotten, ending, and what another process may do with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fledge.errors import UserError
from fledge.serve.errors import ApiError
from fledge.serve.jobs import Job, Jobs
from fledge.serve.sse import EventStream
from fledge.store import jobs as stored
from fledge.store.database import Database, sqlite_url

pytestmark = pytest.mark.anyio


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = Database(sqlite_url(tmp_path / "a.db"))
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
async def jobs(database: Database) -> AsyncIterator[Jobs]:
    opened = Jobs(database, max_running=3)
    await opened.open()
    yield opened
    await opened.close(0.1)


class Slow:
    """A generation that says a letter whenever it is told to go on."""

    def __init__(self) -> None:
        self.gate = asyncio.Semaphore(0)
        self.was_cancelled = False

    async def __call__(self, job: Job) -> str:
        try:
            for letter in "abc":
                await self.gate.acquire()
                job.emit(f'"{letter}"'.encode())
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return "abc"

    def go(self, times: int = 1) -> None:
        for _ in range(times):
            self.gate.release()


async def read(job: Job, start: int = 0) -> list[bytes]:
    return [event async for events in job.follow(start, 10) for event in events]


async def test_readers_get_the_same_events_from_wherever_they_begin(jobs: Jobs) -> None:
    run = Slow()
    job = await jobs.start("alice", "chat", run)
    readers = [asyncio.create_task(read(job, start)) for start in (0, 2)]
    run.go(3)
    assert await readers[0] == [b'"a"', b'"b"', b'"c"']
    assert await readers[1] == [b'"c"']
    assert (job.result, job.status) == ("abc", stored.DONE)


async def test_the_last_reader_takes_the_job_with_it_unless_it_is_kept(jobs: Jobs) -> None:
    for is_kept in (False, True):
        run = Slow()
        job = await jobs.start("alice", "chat", run, is_kept=is_kept)
        second = await jobs.rejoin("alice", job.id)
        assert second is job
        await asyncio.sleep(0)
        job.leave()
        assert not job.is_done
        job.leave()
        if is_kept:
            run.go(3)
        assert job.task is not None
        await job.task
        assert run.was_cancelled is not is_kept


async def test_a_job_is_found_by_its_owner_alone(jobs: Jobs) -> None:
    job = await jobs.start("alice", "chat", Slow(), is_kept=True)
    assert jobs.find("bob", job.id) is None
    assert await jobs.rejoin("bob", job.id) is None
    assert not await jobs.cancel("bob", job.id)
    assert await jobs.cancel("alice", job.id)


async def test_a_full_server_says_so(jobs: Jobs) -> None:
    for _ in range(3):
        await jobs.start("alice", "chat", Slow())
    with pytest.raises(ApiError) as caught:
        await jobs.start("alice", "chat", Slow())
    assert (caught.value.status, caught.value.headers) == (503, {"retry-after": "1"})


async def test_a_failure_before_the_first_event_is_raised_and_after_it_told(jobs: Jobs) -> None:
    async def fail(job: Job) -> None:
        raise UserError("nothing to say")

    job = await jobs.start("alice", "chat", fail)
    with pytest.raises(ApiError, match="nothing to say"):
        await job.begun(5)

    async def fail_late(job: Job) -> None:
        job.emit(b"1")
        raise UserError("stuck")

    job = await jobs.start("alice", "chat", fail_late)
    await job.begun(5)
    assert (await read(job), job.status) == ([b"1"], stored.FAILED)


async def test_another_process_reads_a_kept_job_and_ends_it(database: Database, jobs: Jobs) -> None:
    run = Slow()
    job = await jobs.start("alice", "chat", run, is_kept=True)
    other = Jobs(database, max_running=1)
    mirror = await other.rejoin("alice", job.id)
    assert mirror is not None
    run.go()
    await mirror.begun(10)
    assert mirror.events == [b'"a"']
    assert await other.cancel("alice", job.id)
    assert await read(mirror) == [b'"a"']
    assert run.was_cancelled
    assert (mirror.status, mirror.error is not None) == (stored.CANCELLED, True)


async def test_closing_waits_and_then_ends_what_runs(database: Database) -> None:
    closing = Jobs(database, max_running=9)
    await closing.open()
    quick, slow = Slow(), Slow()
    first = await closing.start("alice", "chat", quick, is_kept=True)
    second = await closing.start("alice", "chat", slow, is_kept=True)
    await asyncio.sleep(0)
    quick.go(3)
    await closing.close(0.2)
    assert (first.status, second.status) == (stored.DONE, stored.CANCELLED)
    found = await stored.read_events(database, "alice", first.id, 0)
    assert found is not None
    assert (found[0].status, found[1]) == (stored.DONE, ['"a"', '"b"', '"c"'])
    with pytest.raises(ApiError):
        await closing.start("alice", "chat", Slow())


async def test_silence_is_filled_with_comments_that_are_no_events(jobs: Jobs) -> None:
    run = Slow()
    job = await jobs.start("alice", "chat", run)
    sent: list[bytes] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(3600)
        return {}

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if sent.count(b": keep-alive\n\n") == 2:
            run.go(3)

    stream = EventStream(job, keep_alive_seconds=0.02)
    await stream({"type": "http"}, receive, send)
    assert (
        b"".join(sent).replace(b": keep-alive\n\n", b"") == b'data: "a"\n\ndata: "b"\n\ndata: "c"\n\ndata: [DONE]\n\n'
    )
