"""Fine-tuning jobs, run for real: by all three methods, stopped in every way, and served under their names."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from align_world import plant, questions

from fledge.config import to_json
from fledge.data.package import cache_home
from fledge.files import sha256_file
from fledge.recipes.align import plan_of
from fledge.recipes.desk import Desk
from fledge.recipes.tuning import FileError, JobFolder, order_of, result_name, take_in
from fledge.store import tuning
from fledge.store.blobs import Blobs
from fledge.store.database import Database, sqlite_url
from fledge.store.files import NewFile, add_file, find_file
from fledge.store.models import list_models
from fledge.store.pages import Cursor, new_id, now
from fledge.store.tables import TuningJobRow

pytestmark = pytest.mark.anyio
GRADER = {
    "type": "text_similarity",
    "name": "like",
    "evaluation_metric": "fuzzy_match",
    "input": "{{sample.output_text}}",
    "reference": "{{item.wanted}}",
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def chats() -> list[dict[str, Any]]:
    said = [{"role": "assistant", "content": "yes i do"}]
    return [{"messages": [{"role": "user", "content": q}, *said]} for q in questions()]


def preferences() -> list[dict[str, Any]]:
    outputs = {"preferred_output": "yes i do", "non_preferred_output": "no i do not"}
    answers = {key: [{"role": "assistant", "content": text}] for key, text in outputs.items()}
    return [{"input": {"messages": [{"role": "user", "content": q}]}, **answers} for q in questions()]


def prompts() -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": q}], "wanted": "yes i do"} for q in questions()]


class Place:
    """A server's folder and database, with a model to tune."""

    def __init__(self, home: Path, world: Path) -> None:
        self.home, self.folder, self.base = home, home / "server", world / "runs" / "tiny" / "sft" / "model"
        self.database = Database(sqlite_url(self.folder / "fledge.db"))
        self.blobs = Blobs(self.folder / "blobs")
        self.workers: list[subprocess.Popen[bytes]] = []
        home.mkdir(exist_ok=True)
        (home / "kernels").symlink_to(cache_home() / "kernels")  # which are built but once a machine

    async def upload(self, rows: list[dict[str, Any]]) -> str:
        with self.blobs.writer() as writer:
            writer.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            return (await add_file(self.database, writer, NewFile("alice", "a.jsonl", "fine-tune"))).id

    async def begin(self, rows: list[dict[str, Any]], method: dict[str, Any], **others: Any) -> TuningJobRow:
        row = TuningJobRow(id=new_id("ftjob-"), created_at=now(), owner="alice", status="validating_files", seed=3)
        row.model, row.base_path, row.method, row.result_files = "tiny", str(self.base), method, []
        row.training_file = await self.upload(rows)
        for name, value in others.items():
            setattr(row, name, value)
        await tuning.add_tuning_job(self.database, row)
        return row

    def start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """A worker in a process of its own, as on a server."""
        command = [sys.executable, "-m", "fledge", "worker", "--threads", "1", "--name", name, *options]
        environment = {**os.environ, "FLEDGE_HOME": str(self.home)}
        environment.pop("FLEDGE_DATABASE_URL", None)
        self.workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        return self.workers[-1]

    async def work(self) -> None:
        """Until there is nothing left to do."""
        process = self.start("last", "--idle-seconds", "3")
        assert await asyncio.to_thread(process.wait, 500) == 0

    async def job(self, job: TuningJobRow) -> TuningJobRow:
        found = await tuning.find_tuning_job(self.database, "alice", job.id)
        assert found is not None
        return found

    async def events(self, job: TuningJobRow) -> list[str]:
        page = await tuning.list_tuning_events(self.database, job.id, Cursor(1000))
        return [row.message for row in page.rows]

    async def until(self, job: TuningJobRow, status: str, seconds: float = 300) -> TuningJobRow:
        deadline = time.monotonic() + seconds
        while (found := await self.job(job)).status != status:
            assert found.status not in ("failed", "succeeded"), (found.status, found.error)
            assert time.monotonic() < deadline, f"still {found.status}"
            await asyncio.sleep(0.05)
        return found

    async def until_step(self, job: TuningJobRow, step: int | None = None) -> None:
        """Wait until this step is told of, or any; of long jobs not every step is (`MAX_EVENTS`)."""
        wanted = "Step " if step is None else f"Step {step}/"
        for _ in range(4000):
            if any(message.startswith(wanted) for message in await self.events(job)):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never told: {wanted}")

    def model_of(self, job: TuningJobRow, method: str) -> str:
        return sha256_file(JobFolder.of(self.folder, job.id).run(method) / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("world"))


@pytest.fixture
async def place(tmp_path: Path, world: Path) -> AsyncIterator[Place]:
    found = Place(tmp_path / "home", world)
    await found.database.open()
    yield found
    for worker in found.workers:  # those that a test which failed has left
        worker.kill()
        worker.wait()
    await found.database.close()


def method(kind: str, **numbers: Any) -> dict[str, Any]:
    grader = {"grader": GRADER} if kind == "reinforcement" else {}
    return {"type": kind, kind: {"hyperparameters": numbers, **grader}}


ROWS = {"supervised": chats, "dpo": preferences, "reinforcement": prompts}


async def taken_in(
    place: Place, kind: str, rows: list[dict[str, Any]], **numbers: Any
) -> tuple[TuningJobRow, JobFolder]:
    job = await place.begin(rows, method(kind, **numbers))
    file = await find_file(place.database, "alice", job.training_file)
    assert file is not None
    folder = JobFolder.of(place.folder, job.id)
    take_in(job, folder, {"training_file": place.blobs.path(file.sha256)})
    return job, folder


@pytest.mark.parametrize(
    ("kind", "numbers", "expected"),
    [
        ("supervised", {"n_epochs": 5, "batch_size": 4}, {"fit.epochs": 5, "fit.batch": 4}),
        ("dpo", {"beta": 0.3, "n_epochs": "auto", "batch_size": 2}, {"beta": 0.3, "fit.epochs": 1, "fit.batch": 2}),
        ("reinforcement", {"batch_size": 12, "n_epochs": 2}, {"prompts": 12, "group": 8, "rounds": 8, "minibatch": 32}),
        ("reinforcement", {"batch_size": 1, "compute_multiplier": 0.1}, {"prompts": 1, "group": 8, "minibatch": 8}),
        ("reinforcement", {"batch_size": 2, "compute_multiplier": 0.5}, {"prompts": 2, "group": 4, "minibatch": 8}),
        ("reinforcement", {"compute_multiplier": 3, "n_epochs": 1}, {"group": 24, "rounds": 6, "warmup_rounds": 1}),
    ],
)
async def test_a_jobs_numbers_reach_its_plan(
    place: Place, kind: str, numbers: dict[str, Any], expected: dict[str, Any]
) -> None:
    job, folder = await taken_in(place, kind, ROWS[kind](), **numbers)
    plan = plan_of(order_of(job, folder))
    found = to_json(plan.train)
    for name, value in expected.items():
        inner = found
        for key in name.split("."):
            inner = inner[key]
        assert inner == value, name
    assert (plan.seed, plan.checkpoints, plan.start.name) == (3, 2, str(place.base))


async def test_a_multiplier_scales_the_learning_rate_that_would_be(place: Place) -> None:
    rates = []
    for numbers in ({}, {"learning_rate_multiplier": 0.5}):
        job, folder = await taken_in(place, "supervised", chats(), **numbers)
        rates.append(plan_of(order_of(job, folder)).train.fit.lr)
    assert rates[1] == pytest.approx(rates[0] / 2)


@pytest.mark.parametrize(
    ("kind", "rows", "told"),
    [
        ("supervised", chats()[:9], "9 examples, at least 10"),
        ("supervised", [*chats(), {"messages": []}], r"training\.jsonl, line 49"),
        ("supervised", preferences(), "learns from chats"),
        ("dpo", chats(), "learns from preferences"),
        ("reinforcement", [*prompts(), {"wanted": "x"}], "line 49: expected 'messages'"),
        ("reinforcement", chats(), "assistant speaks last"),
        ("supervised", chats()[:1] * 12, "bring a validation_file"),
    ],
)
async def test_files_that_cannot_be_learned_from_are_refused_with_their_line(
    place: Place, kind: str, rows: list[dict[str, Any]], told: str
) -> None:
    with pytest.raises(FileError, match=told) as caught:
        await taken_in(place, kind, rows)
    assert caught.value.param == "training_file"
    assert str(place.folder) not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("reinforcement", '{"messages": ' + "[" * 100_000),
        ("supervised", '{"messages": ' + "9" * 5000 + "}"),
        ("reinforcement", '{"messages": ' + "9" * 5000 + "}"),
    ],
)
async def test_a_file_that_cannot_even_be_parsed_fails_its_job_and_no_others(
    place: Place, kind: str, line: str
) -> None:
    bad = await place.begin(ROWS[kind]()[:11], method(kind))
    file = await find_file(place.database, "alice", bad.training_file)
    assert file is not None
    place.blobs.path(file.sha256).write_text(line + "\n", encoding="utf-8")
    good = await place.begin(chats(), method("supervised"))
    with Desk(str(place.database._url), "w", place.folder):
        failed = await until_checked(place, bad)
        assert (failed.status, failed.error and failed.error["code"]) == ("failed", "invalid_file")
        assert (await until_checked(place, good)).status == "queued"


@pytest.mark.parametrize("kind", ["supervised", "reinforcement"])
async def test_what_is_said_of_a_file_does_not_tell_where_it_lies(place: Place, kind: str) -> None:
    job = await place.begin(prompts(), method(kind))
    blob = place.home / "blob"
    blob.write_bytes(b"\xff\xfe\n" * 20)
    with pytest.raises(FileError, match="not valid UTF-8") as caught:
        take_in(job, JobFolder.of(place.folder, job.id), {"training_file": blob})
    assert str(place.home) not in str(caught.value)


async def until_checked(place: Place, job: TuningJobRow) -> TuningJobRow:
    for _ in range(400):
        if (found := await place.job(job)).status != "validating_files":
            return found
        await asyncio.sleep(0.02)
    raise AssertionError("nobody has looked through its files")


async def test_a_result_is_named_as_published(place: Place) -> None:
    job = await place.begin(chats(), method("supervised"), suffix="a b/c:d", model="/runs/pocket:sft")
    job.id = "ftjob-0123456789abcdef01234567"
    assert result_name(job) == "ft:pocket-sft:alice:a-b-c-d:cdef01234567"
    assert result_name(job, 8) == "ft:pocket-sft:alice:a-b-c-d:cdef01234567:ckpt-step-8"


@pytest.mark.slow
async def test_all_three_methods_train_and_leave_models_metrics_and_checkpoints(place: Place) -> None:
    wanted = {"supervised": {"n_epochs": 4}, "dpo": {"n_epochs": 4}, "reinforcement": {"n_epochs": 1}}
    jobs = [await place.begin(ROWS[kind](), method(kind, **numbers)) for kind, numbers in wanted.items()]
    broken = await place.begin(chats()[:3], method("supervised"))
    await place.work()
    names = [row.id for row in await list_models(place.database, "alice")]
    for job in [await place.job(job) for job in jobs]:
        assert job.status == "succeeded", job.error
        assert job.trained_tokens
        assert job.fine_tuned_model == result_name(job)
        checkpoints = await tuning.list_tuning_checkpoints(place.database, job.id, Cursor())
        assert len(checkpoints.rows) == 2
        assert {job.fine_tuned_model, *(row.model for row in checkpoints.rows)} <= set(names)
        assert all(Path(row.path or "").joinpath("run.json").is_file() for row in checkpoints.rows)
        file = await find_file(place.database, "alice", job.result_files[0])
        assert file is not None
        assert file.purpose == "fine-tune-results"
        head, *lines = place.blobs.read(file.sha256).decode().splitlines()
        assert head.startswith("step,train_")
        assert len(lines) >= 3
    failed = await place.job(broken)
    assert (failed.status, failed.error and failed.error["param"]) == ("failed", "training_file")


@pytest.mark.slow
async def test_paused_resumed_and_killed_jobs_end_in_the_same_bits(place: Place) -> None:
    numbers = {"n_epochs": 20, "batch_size": 1}
    whole = await place.begin(chats(), method("supervised", **numbers))
    await place.work()
    job = await place.begin(chats(), method("supervised", **numbers))
    worker = place.start("one")
    last = next(message for message in reversed(await place.events(whole)) if message.startswith("Step "))
    every = -(-int(last.partition("/")[2].partition(":")[0]) // 200)
    await place.until_step(job, 10 * every)
    await tuning.ask_of_job(place.database, "alice", job.id, when=("running",), wanted="pause")
    await place.until(job, "paused")
    await tuning.ask_of_job(place.database, "alice", job.id, when=("paused",), status="validating_files")
    await place.until_step(job, 40 * every)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert (await place.job(job)).status == "running"
    await tuning.release_jobs(place.database, "one")
    worker = place.start("two")
    await place.until_step(job, 80 * every)
    worker.terminate()  # as a server that is shut down does
    assert await asyncio.to_thread(worker.wait, 60) == 0
    assert (await place.job(job)).status == "queued"
    await place.work()
    assert (await place.job(job)).status == "succeeded"
    assert place.model_of(job, "supervised") == place.model_of(whole, "supervised")
    told = [message for message in await place.events(job) if message.startswith("Step ")]
    assert told == list(dict.fromkeys(told))
    assert told == [message for message in await place.events(whole) if message.startswith("Step ")]


@pytest.mark.slow
async def test_a_cancelled_job_ends_where_it_is(place: Place) -> None:
    job = await place.begin(chats(), method("supervised", n_epochs=50, batch_size=1))
    worker = place.start("one")
    await place.until_step(job)
    await tuning.ask_of_job(place.database, "alice", job.id, when=("running",), wanted="cancel")
    await place.until(job, "cancelled")
    worker.terminate()
    assert await asyncio.to_thread(worker.wait, 60) == 0
    assert (await place.job(job)).fine_tuned_model is None
