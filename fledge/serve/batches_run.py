"""Running batches: lines through the app, answers into the store, files at the end.

A batch is leased, so that of several servers one has it; the answer to a line is written once, so that a batch whose
server was killed goes on behind what is written. Lines wait where their key's budget, or the engine, says so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp

from fledge.serve.auth import Principal
from fledge.serve.batch_input import Asked, check, read
from fledge.serve.errors import ApiError, api_error
from fledge.serve.inside import Told, ask
from fledge.serve.state import State
from fledge.store import batches as stored
from fledge.store.batches import Line
from fledge.store.blobs import BlobWriter
from fledge.store.files import NewFile, file_row, find_file
from fledge.store.pages import new_id, now
from fledge.store.tables import Base, BatchRow, FileRow

log = logging.getLogger(__name__)

MAX_BATCHES, MAX_LINES = 4, 16  # at once, of this server
LOOK_SECONDS = 0.5
RENEW_SECONDS = 5.0
MAX_TRIES, MAX_WAIT = 8, 30.0  # of a line that the server cannot answer just now; seconds between two
_ENDING = ("in_progress", "cancelling", "finalizing")
_EXPIRED = "This request could not be executed before the completion window expired."


class Batches:
    """`open` begins to look for batches, `close` leaves what runs to whoever comes next."""

    def __init__(self, state: State, app: ASGIApp) -> None:
        self._state, self._app = state, app
        self._worker = f"server-{secrets.token_hex(8)}"
        self._lines = asyncio.Semaphore(MAX_LINES)
        self._running: set[asyncio.Task[None]] = set()
        self._looker: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()

    def open(self) -> None:
        self._looker = asyncio.create_task(self._look())

    async def close(self) -> None:
        self._stop.set()
        if self._looker is not None:
            await self._looker  # what it asks of the database is let end
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(SQLAlchemyError, OSError):
            await stored.release_batches(self._state.database, self._worker)

    async def _look(self) -> None:
        while not self._stop.is_set():
            try:
                while len(self._running) < MAX_BATCHES and await self._begin():
                    pass
            except (SQLAlchemyError, OSError) as error:
                log.error("no batch is looked for: %s", error)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._stop.wait()

    async def _begin(self) -> bool:
        row = await stored.lease_batch(self._state.database, self._worker)
        if row is None:
            return False
        task = asyncio.create_task(self._run(row))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return True

    async def _run(self, row: BatchRow) -> None:
        """One batch, as far as it goes; what fails here is tried again when the lease has run out."""
        try:
            await Running(self._state, self._app, self._worker, row, self._lines).run()
        except (SQLAlchemyError, OSError) as error:
            log.error("batch %s waits: %s", row.id, error)
            await asyncio.sleep(RENEW_SECONDS)
        except Exception as error:
            log.error("batch %s waits", row.id, exc_info=error)
            await asyncio.sleep(RENEW_SECONDS)


class Running:
    """One batch while this server has it."""

    def __init__(self, state: State, app: ASGIApp, worker: str, row: BatchRow, lines: asyncio.Semaphore) -> None:
        self._state, self._app, self._worker, self._row, self._slots = state, app, worker, row, lines
        self._done: list[Line] = []  # answered, not yet written
        self._writing = asyncio.Lock()
        self._status: str | None = row.status  # None: another server has it now

    async def run(self) -> None:
        keeper = asyncio.create_task(self._keep())
        try:
            if self._status in ("validating", "cancelling") and not self._row.counts["total"]:
                await self._validate()
            errors = await self._answer_all() if self._status in ("in_progress", "cancelling") else None
            if self._status in ("in_progress", "cancelling", "finalizing"):
                await self._finish(errors)
        finally:
            keeper.cancel()
            with suppress(asyncio.CancelledError):
                await keeper
            await self._write()

    # Before the first line.

    async def _validate(self) -> None:
        row, database = self._row, self._state.database
        file = await find_file(database, row.owner, row.input_file_id)
        if file is None:
            gone = _problem("file_not_found", "the input file is gone")
            await self._change(("validating", "cancelling"), _failing([gone]))
            return
        found = await asyncio.to_thread(check, self._state.blobs.path(file.sha256), row.endpoint)
        if found.errors:
            await self._change(("validating", "cancelling"), _failing(list(found.errors)))
            return

        def begin(fresh: BatchRow) -> Sequence[Base]:
            fresh.counts = {**fresh.counts, "total": found.total}
            fresh.extra = {**fresh.extra, "model": found.model}
            if fresh.status == "validating":
                fresh.status, fresh.times = "in_progress", {**fresh.times, "in_progress_at": now()}
            return ()

        await self._change(("validating", "cancelling"), begin)

    # The lines.

    async def _answer_all(self) -> list[dict[str, Any]] | None:
        """Every line that has no answer yet; or why there will be none."""
        row, state = self._row, self._state
        principal = await state.keys.holder(str(row.extra.get("key_id")))
        file = await find_file(state.database, row.owner, row.input_file_id)
        if principal is None:
            return [_problem("invalid_api_key", "the key that made the batch is revoked")]
        if file is None:
            return [_problem("file_not_found", "the input file is gone")]
        path = state.blobs.path(file.sha256)
        await self._answer(read(path, row.endpoint, but=await stored.answered(state.database, row.id)), principal)
        if self._is_late and self._status == "in_progress":
            await self._write()
            error = {"code": "batch_expired", "message": _EXPIRED}
            left = read(path, row.endpoint, but=await stored.answered(state.database, row.id))
            self._done += [_line(line, None, error) for line in left]
        return None

    async def _answer(self, asked: Iterator[Asked], principal: Principal) -> None:
        """Line after line, several at once, until the batch is to end."""
        running: set[asyncio.Task[None]] = set()
        try:
            while self._goes_on:
                # The slot is taken before the line is read: a file is held a few lines at a time.
                if not await self._take_slot():
                    continue
                line = await asyncio.to_thread(next, asked, None)
                if line is None:
                    self._slots.release()
                    break
                task = asyncio.create_task(self._answer_one(line, principal))
                running.add(task)
                task.add_done_callback(running.discard)
            while running and self._goes_on:
                await asyncio.wait(running, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _take_slot(self) -> bool:
        """False if none came free for a moment, in which the batch may have come to its end."""
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                return await self._slots.acquire()
        except TimeoutError:
            return False

    async def _answer_one(self, line: Asked, principal: Principal) -> None:
        try:
            # The answer first: what is done is another list whenever some of it has been written.
            told = await self._ask(line, principal)
            self._done.append(_line(line, told, None))
        except Exception as error:
            log.error("line %d of batch %s", line.number, self._row.id, exc_info=error)
            self._done.append(_line(line, Told.of(api_error(error)), None))
        finally:
            self._slots.release()

    async def _ask(self, line: Asked, principal: Principal) -> Told:
        """The line's answer. A budget is waited for as long as it takes, a server that is busy for a while."""
        if line.body.get("stream"):
            message = "The lines of a batch are not streamed"
            return Told.of(ApiError(400, message, param="stream", code="unsupported_parameter"))
        body, tries = json.dumps(line.body).encode(), 0
        while True:
            await _within_budget(principal)
            told = await ask(self._app, principal, self._row.endpoint, body)
            tries += told.status != 429
            is_final = told.status not in (429, 499, 503) or told.headers.get("x-should-retry") == "false"
            if is_final or tries >= MAX_TRIES:
                return told
            await asyncio.sleep(min(float(told.headers.get("retry-after", 2**tries)), MAX_WAIT))

    @property
    def _goes_on(self) -> bool:
        return self._status == "in_progress" and not self._is_late

    @property
    def _is_late(self) -> bool:
        return self._row.expires_at is not None and now() >= self._row.expires_at

    # The end.

    async def _finish(self, errors: list[dict[str, Any]] | None) -> None:
        """Every answer into the files, and the batch closed, in one block."""
        if not await self._write():
            return
        final = "failed" if errors else "expired" if self._is_late else "completed"
        num_answered = len(await stored.answered(self._state.database, self._row.id))
        if self._status == "in_progress" and not errors and num_answered < self._row.counts["total"]:
            raise RuntimeError(f"{num_answered} of {self._row.counts['total']} lines are answered; it is gone on with")
        told = None if errors is None else {"object": "list", "data": errors}
        await self._change(_ENDING, lambda row: _finalize(row, final, told))
        if self._status is None:
            return
        final = "cancelled" if self._status == "cancelling" else str(self._row.extra["final"])
        with ExitStack() as files:
            writers, usage = await self._gather(files)
            await self._change(_ENDING, lambda row: self._close(row, final, writers, usage), is_last=True)

    async def _gather(self, files: ExitStack) -> tuple[dict[str, BlobWriter], dict[str, int]]:
        """The contents of the output and of the error file, where there is something in them, and what it all cost."""
        writers: dict[str, BlobWriter] = {}
        usage = {"input": 0, "cached": 0, "output": 0}
        after = -1
        while found := await stored.read_lines(self._state.database, self._row.id, after):
            for line in found:
                name = "error" if line.is_error else "output"
                if name not in writers:
                    writers[name] = files.enter_context(self._state.blobs.writer())
                writers[name].write(line.data.encode() + b"\n")
                _add_usage(usage, line.data)
            after = found[-1].number
        return writers, usage

    def _close(
        self, row: BatchRow, final: str, writers: Mapping[str, BlobWriter], usage: Mapping[str, int]
    ) -> Sequence[FileRow]:
        seconds = row.extra.get("expires_after")
        expires_at = None if seconds is None else now() + seconds
        files = {
            name: file_row(writer, NewFile(row.owner, f"{row.id}_{name}.jsonl", "batch_output", expires_at))
            for name, writer in writers.items()
        }
        row.output_file_id = files["output"].id if "output" in files else None
        row.error_file_id = files["error"].id if "error" in files else None
        row.status, row.times = final, {**row.times, f"{final}_at": now()}
        row.worker = row.leased_until = None
        told = {"input_tokens": usage["input"], "input_tokens_details": {"cached_tokens": usage["cached"]}}
        told |= {"output_tokens": usage["output"], "output_tokens_details": {"reasoning_tokens": 0}}
        row.extra = {**row.extra, "usage": {**told, "total_tokens": usage["input"] + usage["output"]}}
        return list(files.values())

    # The store.

    async def _keep(self) -> None:
        """Write what is answered, renew the lease, and hear whether the batch is to end."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._write()
                self._status = await stored.renew_batch(self._state.database, self._row.id, self._worker)
            except (SQLAlchemyError, OSError) as error:
                log.error("answers of batch %s are not written yet: %s", self._row.id, error)

    async def _write(self) -> bool:
        """False if the batch is no longer this server's."""
        async with self._writing:
            lines, self._done = self._done, []
            try:
                if lines and not await stored.add_lines(self._state.database, self._row.id, self._worker, lines):
                    self._status = None
            except BaseException:
                self._done = lines + self._done
                raise
        return self._status is not None

    async def _change(
        self, when: tuple[str, ...], change: Callable[[BatchRow], Sequence[Base]], *, is_last: bool = False
    ) -> None:
        database = self._state.database
        row = await stored.change_batch(database, self._row.id, self._worker, when, change, is_last=is_last)
        self._status = None if row is None else row.status
        self._row = row or self._row


async def _within_budget(principal: Principal) -> None:
    """Wait until the key may make another request."""
    while True:
        try:
            principal.budgets.charge("requests", 1)
            return
        except ApiError as error:
            await asyncio.sleep(min(float(error.headers.get("retry-after", 1)), MAX_WAIT))


def _line(asked: Asked, told: Told | None, error: dict[str, Any] | None) -> Line:
    """An answer as the output and error files have it."""
    response = None
    if told is not None:
        response = {"status_code": told.status, "request_id": told.headers.get("x-request-id"), "body": told.body}
    data = {"id": new_id("batch_req_"), "custom_id": asked.custom_id, "response": response, "error": error}
    return Line(asked.number, told is None or told.status >= 400, json.dumps(data, ensure_ascii=False))


def _problem(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message, "param": None, "line": None}


def _failing(errors: list[dict[str, Any]]) -> Callable[[BatchRow], Sequence[Base]]:
    def fail(row: BatchRow) -> Sequence[Base]:
        row.status, row.times = "failed", {**row.times, "failed_at": now()}
        row.errors = {"object": "list", "data": errors}
        row.worker = row.leased_until = None
        return ()

    return fail


def _finalize(row: BatchRow, final: str, errors: dict[str, Any] | None) -> Sequence[Base]:
    """A batch that was to be cancelled stays so until it is; one that finalizes already knows its end."""
    if row.status == "in_progress":
        row.status, row.times = "finalizing", {**row.times, "finalizing_at": now()}
        row.extra, row.errors = {**row.extra, "final": final}, errors
    return ()


def _add_usage(usage: dict[str, int], data: str) -> None:
    """Both spellings: of chats and texts, and of responses."""
    body = (json.loads(data).get("response") or {}).get("body") or {}
    told = body.get("usage") or {}
    usage["input"] += told.get("prompt_tokens", told.get("input_tokens", 0))
    usage["output"] += told.get("completion_tokens", told.get("output_tokens", 0))
    details = told.get("prompt_tokens_details") or told.get("input_tokens_details") or {}
    usage["cached"] += details.get("cached_tokens", 0)
