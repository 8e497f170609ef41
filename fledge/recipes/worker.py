"""The worker: takes fine-tuning jobs from the database one after another and runs them. What `fledge worker` calls.

Training is on the main thread, the database on another (desk.py). A worker that dies leaves a job that another takes
over, where its last state stands, to the same bits: the run folder is that of every alignment run (align.py).
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fledge.errors import EngineError, Interrupted, TrainingHalted, UserError
from fledge.recipes.align import align
from fledge.recipes.desk import Desk
from fledge.recipes.interrupts import Interrupts
from fledge.recipes.runs import read_manifest
from fledge.recipes.tuning import (
    METHODS,
    FileError,
    JobFolder,
    checkpoints_in,
    order_of,
    result_name,
    result_table,
    step_data,
)
from fledge.store.files import NewFile, file_row
from fledge.store.pages import new_id, now
from fledge.store.tables import Base, ModelRow, TuningCheckpointRow, TuningJobRow
from fledge.types import Metrics

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.5
MAX_EVENTS = 200  # of steps, in one job


def worker_name() -> str:
    """One that no other worker has, on this machine or another."""
    return f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclass(frozen=True)
class WorkerOrder:
    """`folder` is the server's, with blobs and jobs; `idle_seconds` None: wait for jobs for ever."""

    url: str
    folder: Path
    name: str = field(default_factory=worker_name)
    idle_seconds: float | None = None


def work(order: WorkerOrder) -> None:
    """Run jobs until there are none for `idle_seconds`, or until SIGTERM or Ctrl-C, which put back a job that runs."""
    stop = Interrupts()
    with _between_jobs(stop), Desk(order.url, order.name, order.folder) as desk:
        idle_since = time.monotonic()
        while not stop.wanted:
            job = desk.next_job()
            if job is not None:
                Running(desk, job, JobFolder.of(order.folder, job.id), stop).run()
                idle_since = time.monotonic()
            elif order.idle_seconds is not None and time.monotonic() - idle_since > order.idle_seconds:
                return
            else:
                time.sleep(IDLE_SECONDS)


@contextmanager
def _between_jobs(stop: Interrupts) -> Iterator[None]:
    """SIGTERM and Ctrl-C while nothing trains; `align` has its own hold of them while something does."""

    def receive(*_: object) -> None:
        stop.wanted = True

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Running:
    """One job while it is run. It is the listener of its alignment run. `stop` is told when the machine ends it."""

    def __init__(self, desk: Desk, job: TuningJobRow, folder: JobFolder, stop: Interrupts) -> None:
        self._desk, self._job, self._folder, self._stop = desk, job, folder, stop
        self._kind: str = job.method["type"]
        self._interrupts = Interrupts()
        self._left_behind: set[int] = set()
        self._began: tuple[int, float] | None = None  # the first step of this sitting, and when it was done

    def run(self) -> None:
        """To its end, or until its owner or the machine stops it."""
        wanted = None
        try:
            with self._desk.holding(self._job.id, self._interrupts) as held:
                self._desk.tell(self._job.id, "Fine-tuning job started")
                try:
                    align(order_of(self._job, self._folder), self, self._interrupts)
                finally:
                    wanted = held.wanted
        except Interrupted:
            self._settle_stop(wanted)
        except Exception as error:
            self._fail(error)
        else:
            self._finish()

    # The listener's side.

    def stage(self, name: str, status: str, note: str) -> None:
        log.info("%s: %s %s %s", self._job.id, name, status, note)
        if status == "resumed":
            self._desk.tell(self._job.id, "Going on where it stopped")

    def step(self, stage: str, step: int, num_steps: int, metrics: Metrics) -> None:
        if stage != METHODS[self._kind]:
            return
        data = step_data(self._kind, step, num_steps, metrics)
        self._leave_checkpoints(step, data)
        if step % max(1, -(-num_steps // MAX_EVENTS)) == 0 or step == num_steps:
            self._estimate(step, num_steps)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in data.items() if name.startswith("train"))
            self._desk.tell(self._job.id, f"Step {step}/{num_steps}: {shown}", data, event_id=self._event_id(step))

    def _event_id(self, step: int) -> str:
        """The same for a step that is done again after the job was resumed."""
        return "ftevent-" + hashlib.sha256(f"{self._job.id}/{step}".encode()).hexdigest()[:24]

    def _estimate(self, step: int, num_steps: int) -> None:
        if self._began is None:
            self._began = step, time.monotonic()
            return
        pace = (time.monotonic() - self._began[1]) / (step - self._began[0])
        self._desk.change(self._job.id, estimated_finish=now() + round(pace * (num_steps - step)))

    def _leave_checkpoints(self, step: int, data: dict[str, Any]) -> None:
        """Serve the models that the run has left behind; a resumed run may find one that nobody was told of."""
        for number, path in checkpoints_in(self._folder, self._kind).items():
            if number > step or number in self._left_behind:
                continue
            self._left_behind.add(number)
            metrics = {name: float(value) for name, value in data.items() if name != "total_steps"}
            metrics = metrics if number == step else {"step": float(number)}
            name = result_name(self._job, number)
            row = TuningCheckpointRow(id=new_id("ftckpt_"), created_at=now(), job_id=self._job.id, model=name)
            row.step_number, row.metrics, row.path = number, metrics, str(path)
            if self._desk.leave_checkpoint(row, self._model(name, path)):
                self._desk.tell(self._job.id, f"Checkpoint created at step {number}")

    def _model(self, name: str, path: Path) -> ModelRow:
        job = self._job
        row = ModelRow(id=name, created_at=now(), owner=job.owner, owned_by=job.owner, path=str(path))
        row.job_id = job.id
        return row

    # The ends.

    def _settle_stop(self, wanted: str | None) -> None:
        job_id = self._job.id
        idle = {"wanted": None, "worker": None, "leased_until": None, "estimated_finish": None}
        if wanted == "cancel":
            self._desk.change(job_id, status="cancelled", finished_at=now(), **idle)
            self._desk.tell(job_id, "Fine-tuning job cancelled")
        elif wanted == "pause":
            self._desk.change(job_id, status="paused", **idle)
            self._desk.tell(job_id, "Fine-tuning job paused")
        elif wanted is None:
            self._stop.wanted = True
            self._desk.tell(job_id, "The worker has been stopped; the job will go on where it stands", level="warn")
            self._desk.change(job_id, status="queued", **idle)

    def _fail(self, error: Exception) -> None:
        told = error_of(error)
        told["message"] = told["message"].replace(f"{self._folder.path}/", "")
        told["message"] = told["message"].replace(self._job.base_path or "\0", self._job.model)
        self._desk.tell(self._job.id, f"Failed: {told['message']}", level="error")
        ended = {"finished_at": now(), "worker": None, "leased_until": None, "wanted": None, "estimated_finish": None}
        self._desk.change(self._job.id, status="failed", error=told, **ended)

    def _finish(self) -> None:
        job, place = self._job, self._folder.run(self._kind)
        name, manifest = result_name(job), read_manifest(place)
        table = result_table(self._folder, self._kind).encode()

        def rows() -> Sequence[Base]:
            with self._desk.blobs.writer() as writer:
                writer.write(table)
                file = file_row(writer, NewFile(job.owner, "step_metrics.csv", "fine-tune-results"))
            return [file, self._model(name, place / "model")]

        tokens = 0 if manifest is None else manifest.cost.tokens
        if self._desk.finish(job.id, rows, fine_tuned_model=name, trained_tokens=tokens, estimated_finish=None):
            self._desk.tell(job.id, f"New fine-tuned model created: {name}")
            self._desk.tell(job.id, "The job has successfully completed")


def error_of(error: Exception) -> dict[str, Any]:
    """What a job's owner is told of its failure; the log says more."""
    if isinstance(error, FileError):
        return {"code": "invalid_file", "message": str(error), "param": error.param}
    if isinstance(error, UserError):
        return {"code": "invalid_job", "message": str(error), "param": None}
    if isinstance(error, TrainingHalted):
        return {"code": "training_halted", "message": str(error), "param": None}
    log.error("a job failed", exc_info=error)
    code = "engine_failed" if isinstance(error, EngineError) else "internal_error"
    return {"code": code, "message": "The worker had an error while it trained; its log says more", "param": None}
