"""`fledge serve` with its own worker: a job through the official client, both killed halfway, and its result served."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from real_server import RealServer, await_that

from fledge.files import sha256_file

pytestmark = pytest.mark.slow
CHATS = [
    {"messages": [{"role": "user", "content": f"{word} {i}"}, {"role": "assistant", "content": "the garden"}]}
    for i in range(10)
    for word in ("rain", "snow")
]
NUMBERS = {"n_epochs": 30, "batch_size": 1}


class Place(RealServer):
    """A server that tunes."""

    def begin(self) -> str:
        content = "\n".join(json.dumps(chat) for chat in CHATS).encode()
        file = self.client.files.create(file=("chats.jsonl", content), purpose="fine-tune")
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": NUMBERS}}
        job = self.client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method=method, seed=5)
        return job.id

    def steps(self, job: str) -> list[str]:
        """What has been told of steps, the last first."""
        told = self.client.fine_tuning.jobs.list_events(job, limit=100)
        return [event.message for event in told if event.message.startswith("Step ")]

    def until_further(self, job: str, steps: int) -> None:
        """Wait until so many more steps have been told of."""
        known = len(self.steps(job))
        await_that(lambda: len(self.steps(job)) >= known + steps, 300)

    def ended(self, job: str) -> Any:
        jobs = self.client.fine_tuning.jobs
        await_that(lambda: jobs.retrieve(job).status in ("succeeded", "failed", "cancelled"), 300)
        return jobs.retrieve(job)

    def weights(self, job: str) -> str:
        place = self.home / "server" / "tuning" / job / "run" / "sft" / "model" / "model.safetensors"
        return sha256_file(place)


def test_a_job_outlives_its_killed_server_and_worker_to_the_same_bits_and_its_result_answers(tmp_path: Path) -> None:
    place = Place(tmp_path)
    try:
        job = place.begin()
        place.until_further(job, 1)
        place.kill()
        place.start()
        place.until_further(job, 1)
        os.kill(place.child("worker", "--attached"), signal.SIGKILL)
        done = place.ended(job)
        assert done.status == "succeeded", done.error
        hello: Any = [{"role": "user", "content": "rain 1"}]
        for name in (done.fine_tuned_model, *(one.fine_tuned_model_checkpoint for one in checkpoints(place, job))):
            answer = place.client.chat.completions.create(model=name, messages=hello, max_tokens=5, temperature=0)
            assert answer.choices[0].finish_reason in ("stop", "length")
        table = place.client.files.content(done.result_files[0]).text
        assert table.startswith("step,train_loss,train_mean_token_accuracy")
        other = place.begin()
        assert place.ended(other).status == "succeeded"
        assert place.weights(other) == place.weights(job)
    finally:
        place.end()


def checkpoints(place: Place, job: str) -> list[Any]:
    found = list(place.client.fine_tuning.jobs.checkpoints.list(job))
    assert len(found) == 2
    return found
