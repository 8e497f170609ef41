"""Every generation is a job of the server's, with a log of the events that it has sent.

A client reads the log from where it likes, loses its connection, comes back, and goes on. A job that nobody reads any
more is cancelled, which frees its blocks, unless its client asked to keep it; a kept job's log is written to the
database in batches, so that it outlives its client, its server, and the memory of it. Only its owner finds a job.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from fledge.serve.errors import ApiError, api_error
from fledge.store import jobs as stored
from fledge.store.database import Database
from fledge.store.pages import new_id, now
from fledge.store.tables import JobRow

log = logging.getLogger(__name__)

Run = Callable[["Job"], Awaitable[Any]]
FLUSH_SECONDS = 0.25
SWEEP_SECONDS = 30.0
KEEP_SECONDS = 3600 * 24  # kept jobs are forgotten a day after their end
RECALL_SECONDS = 5.0  # and leave this process's memory after that


@dataclass(eq=False)
class Job:
    """One generation. `events` are JSON texts in the order they are sent; `result` is what `run` gave back."""

    id: str
    owner: str
    kind: str
    is_kept: bool
    events: list[bytes] = field(default_factory=list)
    result: Any = None
    error: ApiError | None = None
    status: str = stored.RUNNING
    num_readers: int = 0
    num_flushed: int = 0
    flushed_at: float = field(default_factory=time.monotonic)
    is_filed: bool = False  # the database knows that it has ended
    ended_at: float | None = None
    task: asyncio.Task[None] | None = None
    _pulse: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_done(self) -> bool:
        return self.status != stored.RUNNING

    def emit(self, event: bytes) -> None:
        """Add an event to the log and wake its readers."""
        self.events.append(event)
        self.wake()

    def wake(self) -> None:
        self._pulse.set()
        self._pulse = asyncio.Event()

    async def changed(self, seconds: float | None) -> bool:
        """Wait for the next event or the end; false if none came in this time."""
        pulse = self._pulse
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await pulse.wait()
        return pulse.is_set()

    async def begun(self, seconds: float) -> None:
        """Wait for the first event, but not longer than this. Raises the error of a job that failed before it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.events and not self.is_done:
                    await self.changed(None)
        if self.error is not None and not self.events:
            raise self.error

    async def follow(self, start: int, idle_seconds: float) -> AsyncIterator[list[bytes]]:
        """The events from number `start` on, as many at a time as there are; none where nothing came for so long."""
        while True:
            events = self.events[start:]
            start += len(events)
            if events:
                yield events
            elif self.is_done:
                return
            elif not await self.changed(idle_seconds):
                yield []

    def cancel(self) -> None:
        if self.task is not None and not self.is_done:
            self.task.cancel()

    def leave(self) -> None:
        """A reader has gone; the last one takes a job with it that is not kept."""
        self.num_readers -= 1
        if self.num_readers <= 0 and not self.is_kept:
            self.cancel()


class Jobs:
    """The jobs of this process. `max_running` bounds how many there are at once."""

    def __init__(self, database: Database, max_running: int) -> None:
        self._database = database
        self._max_running = max_running
        self._jobs: dict[str, Job] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._is_closing = False

    @property
    def num_running(self) -> int:
        return sum(not job.is_done for job in self._jobs.values())

    async def open(self) -> None:
        self._keeper = asyncio.create_task(self._keep())

    async def start(self, owner: str, kind: str, run: Run, *, is_kept: bool = False, job_id: str | None = None) -> Job:
        """Run a generation; whoever starts it is its first reader. 503 if too many run."""
        if self._is_closing or self.num_running >= self._max_running:
            headers = {"retry-after": "1"}
            raise ApiError(503, "The server is full; try again", code="overloaded", headers=headers)
        job = Job(job_id or new_id("job_"), owner, kind, is_kept, num_readers=1)
        self._jobs[job.id] = job
        if is_kept:
            try:
                await stored.add_job(self._database, job.id, owner, kind)
            except BaseException:
                del self._jobs[job.id]
                raise
        job.task = asyncio.create_task(self._run(job, run))
        return job

    def find(self, owner: str, job_id: str) -> Job | None:
        """A job in this process's memory that is the owner's."""
        job = self._jobs.get(job_id)
        return job if job is not None and job.owner == owner else None

    async def rejoin(self, owner: str, job_id: str) -> Job | None:
        """The owner's job, with one more reader: as it runs here, or as its log in the database tells it."""
        job = self.find(owner, job_id)
        if job is None:
            row = await stored.find_job(self._database, owner, job_id)
            if row is None:
                return None
            job = Job(job_id, owner, row.kind, is_kept=False)
            job.task = asyncio.create_task(self._mirror(job))
        job.num_readers += 1
        return job

    async def cancel(self, owner: str, job_id: str) -> bool:
        """End a job wherever it runs; false if it does not."""
        job = self.find(owner, job_id)
        if job is not None:
            is_running = not job.is_done
            job.cancel()
            return is_running
        return await stored.want_cancelled(self._database, owner, job_id)

    async def forget(self, owner: str, job_id: str) -> None:
        """End a job and drop its log."""
        await self.cancel(owner, job_id)
        if self.find(owner, job_id) is not None:
            del self._jobs[job_id]
        await stored.delete_job(self._database, owner, job_id)

    async def close(self, seconds: float) -> None:
        """Take no more jobs, give those that run this long, cancel the rest, and write down what is kept."""
        self._is_closing = True
        running = [job.task for job in self._jobs.values() if job.task is not None and not job.is_done]
        if running:
            _, late = await asyncio.wait(running, timeout=seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        await self._flush_all()

    async def _mirror(self, job: Job) -> None:
        """Fill a job with what another process, or this one before it was restarted, has written of it."""
        while True:
            found = await stored.read_events(self._database, job.owner, job.id, len(job.events))
            if found is None:
                job.error = ApiError(404, "The job was deleted", code="not_found")
                job.status = stored.FAILED
            else:
                row, events = found
                job.events += [event.encode() for event in events]
                if not events and row.status != stored.RUNNING:
                    job.status, job.error = row.status, _told_error(row)
            job.wake()
            if job.is_done:
                return
            if found is None or not found[1]:
                await asyncio.sleep(FLUSH_SECONDS)

    async def _run(self, job: Job, run: Run) -> None:
        try:
            job.result = await run(job)
            status = stored.DONE
        except asyncio.CancelledError:
            job.error = ApiError(499, "The request was cancelled", code="cancelled", kind="cancelled")
            status = stored.CANCELLED
        except Exception as error:
            job.error = api_error(error)
            status = stored.FAILED
        if not job.is_kept:
            self._jobs.pop(job.id, None)
        job.ended_at = time.monotonic()
        job.status = status
        job.wake()

    # What is kept goes to the database.

    async def _keep(self) -> None:
        swept = -SWEEP_SECONDS
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self._flush_all()
                if time.monotonic() - swept > SWEEP_SECONDS:
                    swept = time.monotonic()
                    await stored.fail_dead_jobs(self._database)
                    await stored.sweep_jobs(self._database, now() - KEEP_SECONDS)
            except (SQLAlchemyError, OSError) as error:
                log.error("events of jobs are not written yet: %s", error)  # they stay in memory; tried again

    async def _flush_all(self) -> None:
        for job in [job for job in self._jobs.values() if job.is_kept]:
            await self._flush(job)
            if job.is_filed and job.ended_at is not None and time.monotonic() - job.ended_at > RECALL_SECONDS:
                del self._jobs[job.id]

    async def _flush(self, job: Job) -> None:
        status, first = job.status, job.num_flushed
        events = [event.decode() for event in job.events[first:]]
        is_stale = time.monotonic() - job.flushed_at > stored.DEAD_SECONDS / 4  # a quiet job is alive too
        if job.is_filed or not (events or job.is_done or is_stale):
            return
        error = None if job.error is None else job.error.body["error"]
        if await stored.add_events(self._database, job.id, first, events, status, error):
            job.cancel()
        job.num_flushed, job.flushed_at = first + len(events), time.monotonic()
        job.is_filed = status != stored.RUNNING


def _told_error(row: JobRow) -> ApiError | None:
    """What a job that has ended failed with; one whose server died could not say."""
    if row.status == stored.DONE:
        return None
    told = row.error or {"message": "The server that ran this job has ended", "code": "server_ended"}
    return ApiError(500, str(told.get("message")), code=told.get("code"), kind=told.get("type"))
