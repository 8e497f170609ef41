"""The worker's other thread: it keeps the lease of the job that trains, hears what its owner wants, looks through the
files of jobs that are new, and writes down what happens. The training thread only ever waits for a write.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from fledge.errors import DataError
from fledge.recipes.interrupts import Interrupts
from fledge.recipes.tuning import FileError, JobFolder, take_in
from fledge.store import tuning
from fledge.store.blobs import Blobs
from fledge.store.database import Database
from fledge.store.files import find_file
from fledge.store.tables import Base, ModelRow, TuningCheckpointRow, TuningJobRow

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
LOOK_SECONDS = 1.0
RETRY_SECONDS, MAX_RETRIES = 2.0, 15  # of writes that must come about


@dataclass
class Held:
    """The job that trains. `wanted` is why it is to stop: its owner's wish, or that another worker has it."""

    job_id: str
    interrupts: Interrupts
    wanted: str | None = None
    renewed_at: float = field(default_factory=time.monotonic)


class Desk:
    """For `with`, in the training thread; every call blocks until it is written."""

    def __init__(self, url: str, worker: str, folder: Path) -> None:
        self._database, self._worker, self._folder = Database(url), worker, folder
        self.blobs = Blobs(folder / "blobs")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="desk", daemon=True)
        self._held: Held | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._database.open)
        self._tending = asyncio.run_coroutine_threadsafe(self._tend(), self._loop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tending.cancel()
        with suppress(SQLAlchemyError, OSError):
            self._call(lambda: tuning.release_jobs(self._database, self._worker))
        self._call(self._database.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # What the training thread asks for.

    def next_job(self) -> TuningJobRow | None:
        return self._call(lambda: tuning.lease_job(self._database, self._worker))

    @contextmanager
    def holding(self, job_id: str, interrupts: Interrupts) -> Iterator[Held]:
        """Keep the lease within the block; if the job is to stop, `interrupts` says so."""
        held = self._held = Held(job_id, interrupts)
        try:
            yield held
        finally:
            self._held = None

    def tell(
        self,
        job_id: str,
        message: str,
        data: Mapping[str, Any] | None = None,
        *,
        level: Literal["info", "warn", "error"] = "info",
        event_id: str | None = None,
    ) -> None:
        """An event. One that cannot be written is left out: training does not wait for a disk with room."""
        told = None if data is None else dict(data)
        try:
            self._call(
                lambda: tuning.add_tuning_event(
                    self._database, job_id, message, level=level, data=told, event_id=event_id
                )
            )
        except (SQLAlchemyError, OSError) as error:
            log.error("an event of %s is not written: %s", job_id, error)

    def change(self, job_id: str, **changes: Any) -> bool:
        return self._insist(lambda: tuning.change_job(self._database, job_id, self._worker, **changes))

    def leave_checkpoint(self, row: TuningCheckpointRow, model: ModelRow) -> bool:
        return self._insist(lambda: tuning.add_tuning_checkpoint(self._database, row, model))

    def finish(self, job_id: str, rows: Callable[[], Sequence[Base]], **changes: Any) -> bool:
        return self._insist(lambda: tuning.finish_job(self._database, job_id, self._worker, rows, **changes))

    def _insist(self, act: Callable[[], Coroutine[Any, Any, ResultT]]) -> ResultT:
        """What must be written is tried again for a while."""
        for _ in range(MAX_RETRIES):
            try:
                return self._call(act)
            except (SQLAlchemyError, OSError) as error:
                log.error("the database is not available, trying again: %s", error)
                time.sleep(RETRY_SECONDS)
        return self._call(act)

    def _call(self, act: Callable[[], Coroutine[Any, Any, ResultT]]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(act(), self._loop).result()

    # What goes on beside the training.

    async def _tend(self) -> None:
        while True:
            try:
                await self._look_after_job()
                for job in await tuning.unchecked_jobs(self._database):
                    await self._check_files(job)
            except (SQLAlchemyError, OSError) as error:
                log.error("the database is not available: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    async def _look_after_job(self) -> None:
        held = self._held
        if held is None:
            return
        if time.monotonic() - held.renewed_at > tuning.WORK_SECONDS:
            is_ours, wanted = await tuning.renew_lease(self._database, held.job_id, self._worker)
            held.renewed_at = time.monotonic()
        else:
            is_ours, wanted = await tuning.look_at_job(self._database, held.job_id, self._worker)
        held.wanted = wanted if is_ours else "lost"
        # Set, never cleared: what has begun to stop stops.
        held.interrupts.wanted = held.interrupts.wanted or held.wanted is not None

    async def _check_files(self, job: TuningJobRow) -> None:
        error = None
        try:
            await asyncio.to_thread(take_in, job, JobFolder.of(self._folder, job.id), await self._contents(job))
        except DataError as found:
            param = found.param if isinstance(found, FileError) else "training_file"
            error = {"code": "invalid_file", "message": str(found), "param": param}
        except OSError:
            raise  # of the disk, which others' files need as well; tried again
        except Exception as found:
            # Whatever somebody has put into a file, it must not end the thread that keeps everybody's jobs.
            log.error("the files of %s cannot be looked through", job.id, exc_info=found)
            message = "the file cannot be read; its rows are JSON objects as the published API has them"
            error = {"code": "invalid_file", "message": message, "param": "training_file"}
        if await tuning.settle_check(self._database, job.id, error):
            message = "Files validated, the job waits for its turn" if error is None else f"Failed: {error['message']}"
            level: Literal["info", "error"] = "info" if error is None else "error"
            await tuning.add_tuning_event(self._database, job.id, message, level=level)

    async def _contents(self, job: TuningJobRow) -> dict[str, Path]:
        found = {}
        for param in ("training_file", "validation_file"):
            file_id = getattr(job, param)
            if file_id is None:
                continue
            row = await find_file(self._database, job.owner, file_id)
            if row is None:
                raise FileError(param, f"the file '{file_id}' has been deleted")
            found[param] = self.blobs.path(row.sha256)
        return found
