"""A job's events as server-sent events, and its result as one answer; both notice when their client goes away.

The published stream is `data: JSON` lines with `data: [DONE]` at the end. Where nothing is to be said a comment keeps
the connection open. A failure after the first event is told in the stream, as `data: {"error": ...}`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fledge.serve.errors import ApiError
from fledge.serve.jobs import Job

KEEP_ALIVE_SECONDS = 15.0
FIRST_EVENT_SECONDS = 10.0  # so long an error may still become the status of the answer
DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode(value), status, dict(headers or {}), "application/json")


class EventStream(Response):
    """Follows a job from event `start` on. `is_named` adds each event's type, `is_numbered` its number as `id`, and
    `edit` has the last word on what an event says."""

    def __init__(
        self,
        job: Job,
        *,
        start: int = 0,
        is_named: bool = False,
        is_numbered: bool = False,
        edit: Callable[[bytes], bytes] | None = None,
        keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"x-fledge-job": job.id})
        # Without a length, and not to be held back by a proxy.
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self.raw_headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        self._job, self._start = job, start
        self._is_named, self._is_numbered = is_named, is_numbered
        self._edit, self._keep_alive_seconds = edit, keep_alive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send(send))
        watcher = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((sender, watcher), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._job.leave()
            for task in (sender, watcher):
                task.cancel()
            results = await asyncio.gather(sender, watcher, return_exceptions=True)
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
            raise results[0]

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        async for data in self._data():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _data(self) -> AsyncIterator[bytes]:
        number = self._start
        async for events in self._job.follow(self._start, self._keep_alive_seconds):
            if not events:
                yield b": keep-alive\n\n"
                continue
            yield b"".join(self._spell(number + i, event) for i, event in enumerate(events))
            number += len(events)
        if self._job.error is not None:
            yield self._spell(number, encode(self._error(self._job.error, number)))
        elif not self._is_named:
            yield DONE

    def _error(self, error: ApiError, number: int) -> dict[str, Any]:
        if not self._is_named:
            return error.body
        told = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return {**told, "sequence_number": number}

    def _spell(self, number: int, event: bytes) -> bytes:
        data = b"data: " + (event if self._edit is None else self._edit(event)) + b"\n\n"
        if self._is_numbered:
            data = b"id: %d\n" % number + data
        return b"event: " + _type_of(event) + b"\n" + data if self._is_named else data


async def streamed(job: Job, **options: Any) -> Response:
    """The stream of a job that was just started. Raises what the job failed with before its first event."""
    try:
        await job.begun(FIRST_EVENT_SECONDS)
    except BaseException:
        job.leave()
        raise
    return EventStream(job, is_numbered=job.is_kept, **options)


async def awaited(job: Job, request: Request) -> Any:
    """The result of a job. Raises what it failed with; a client that goes away leaves the job."""
    watcher = asyncio.create_task(_gone(request.receive))
    assert job.task is not None
    try:
        await asyncio.wait((job.task, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watcher.cancel()
        job.leave()
    if not job.is_done:
        await job.task  # cancelled, or kept although nobody waits
    if job.error is not None:
        raise job.error
    return job.result


def _type_of(event: bytes) -> bytes:
    """The `type` that stands first in an event of `/v1/responses`."""
    head = b'{"type":"'
    return event[len(head) : event.index(b'"', len(head))] if event.startswith(head) else b"error"


async def _gone(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
