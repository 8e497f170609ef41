"""`fledge serve` with its own worker: a job through the official client, killed halfway, and its result served."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from openai import APIConnectionError, OpenAI
from test_serve_real import write_checkpoint

from fledge.data.package import cache_home
from fledge.files import sha256_file

pytestmark = pytest.mark.slow
CHATS = [
    {"messages": [{"role": "user", "content": f"{word} {i}"}, {"role": "assistant", "content": "the garden"}]}
    for i in range(10)
    for word in ("rain", "snow")
]
NUMBERS = {"n_epochs": 50, "batch_size": 1}


class Place:
    """A server that can be killed and started again, on one port and one folder."""

    def __init__(self, folder: Path) -> None:
        self.home, self.model = folder / "home", write_checkpoint(folder / "runs" / "tiny")
        self.home.mkdir()
        (self.home / "kernels").symlink_to(cache_home() / "kernels")  # which are built but once a machine
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port: int = found.getsockname()[1]
        self.environment = {**os.environ, "FLEDGE_HOME": str(self.home)}
        self.environment.pop("FLEDGE_DATABASE_URL", None)
        key = subprocess.run(
            [sys.executable, "-m", "fledge", "keys", "create"], env=self.environment, capture_output=True, check=True
        )
        url = f"http://127.0.0.1:{self.port}/v1"
        self.client = OpenAI(base_url=url, api_key=key.stdout.decode().strip(), max_retries=0, timeout=60)
        self.server = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fledge", "serve", str(self.model), "--port", str(self.port)]
        command += ["--threads", "1", "--alias", f"tiny={self.model}", "--cache-mb", "8"]
        self.server = subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL)
        for _ in range(1200):
            try:
                self.client.models.list()
                return self.server
            except APIConnectionError:
                assert self.server.poll() is None, "the server has ended"
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def begin(self) -> str:
        content = "\n".join(json.dumps(chat) for chat in CHATS).encode()
        file = self.client.files.create(file=("chats.jsonl", content), purpose="fine-tune")
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": NUMBERS}}
        job = self.client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method=method, seed=5)
        return job.id

    def events(self, job: str) -> list[str]:
        return [event.message for event in self.client.fine_tuning.jobs.list_events(job, limit=100)]

    def until_told(self, job: str, start: str) -> None:
        for _ in range(3000):
            if any(message.startswith(start) for message in self.events(job)):
                return
            time.sleep(0.1)
        raise AssertionError(f"never told: {start}")

    def ended(self, job: str) -> Any:
        for _ in range(3000):
            found = self.client.fine_tuning.jobs.retrieve(job)
            if found.status in ("succeeded", "failed", "cancelled"):
                return found
            time.sleep(0.1)
        raise AssertionError("the job never ended")

    def weights(self, job: str) -> str:
        place = self.home / "server" / "tuning" / job / "run" / "sft" / "model" / "model.safetensors"
        return sha256_file(place)


def test_a_job_outlives_a_killed_server_and_its_result_answers_at_once(tmp_path: Path) -> None:
    place = Place(tmp_path)
    try:
        job = place.begin()
        place.until_told(job, "Step ")
        place.server.send_signal(signal.SIGKILL)
        place.server.wait()
        place.start()
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
        place.server.terminate()
        assert place.server.wait(60) == 0


def checkpoints(place: Place, job: str) -> list[Any]:
    found = list(place.client.fine_tuning.jobs.checkpoints.list(job))
    assert len(found) == 2
    return found
