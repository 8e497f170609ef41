"""`fledge serve` as a user starts it: a process over a tiny model, to be killed and started again on its store."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from openai import APIConnectionError, OpenAI

from fledge.config import to_json
from fledge.data.package import cache_home
from fledge.formats.checkpoint import CheckpointInfo, save_model
from fledge.models.gpt import GPT, GPTConfig
from fledge.text.chat import ChatRenderer
from fledge.text.tokenizer import TokenizerConfig, train_tokenizer


def write_checkpoint(directory: Path) -> Path:
    tokenizer = train_tokenizer(["the rain in the garden, 园里下雨"] * 20, TokenizerConfig(vocab_size=300))
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, width=16, num_layers=2, num_heads=2, max_positions=256))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    hashes = {"tokenizer_hash": tokenizer.hash, "template_hash": ChatRenderer(tokenizer).hash}
    save_model(directory, model, tokenizer, CheckpointInfo("gpt", to_json(model.config), "pretrain", **hashes))
    return directory


class RealServer:
    """A server on one port and one folder, whose only model is called "tiny"."""

    def __init__(self, folder: Path) -> None:
        self.home, self.model = folder / "home", write_checkpoint(folder / "runs" / "tiny")
        self.home.mkdir()
        (self.home / "kernels").symlink_to(cache_home() / "kernels")  # which are built but once a machine
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port: int = found.getsockname()[1]
        self.environment = {**os.environ, "FLEDGE_HOME": str(self.home)}
        self.environment.pop("FLEDGE_DATABASE_URL", None)
        made = subprocess.run(
            [sys.executable, "-m", "fledge", "keys", "create"], env=self.environment, capture_output=True, check=True
        )
        self.key = made.stdout.decode().strip()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.client = OpenAI(base_url=self.url, api_key=self.key, max_retries=0, timeout=60)
        self.server = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Give the server back once it answers."""
        command = [sys.executable, "-m", "fledge", "serve", str(self.model), "--port", str(self.port)]
        command += ["--threads", "1", "--alias", f"tiny={self.model}", "--cache-mb", "8"]
        self.server = subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL)
        try:
            await_that(self._answers, 300)
        except BaseException:
            self.server.kill()
            self.server.wait()
            raise
        return self.server

    def _answers(self) -> bool:
        assert self.server.poll() is None, "the server has ended"
        try:
            self.client.models.list()
        except APIConnectionError:
            return False
        return True

    def kill(self) -> None:
        """As a power cut ends it; what it had started ends as well."""
        started = children(self.server.pid)
        self.server.send_signal(signal.SIGKILL)
        self.server.wait()
        await_that(lambda: not any(map(is_alive, started)), 60)

    def child(self, *words: str) -> int:
        """The process of the server whose command line holds all these words; waited for."""
        found: list[int] = []

        def look() -> bool:
            started = children(self.server.pid)
            found[:] = [pid for pid, command in started.items() if set(words) <= set(command) and is_alive(pid)]
            return bool(found)

        await_that(look, 300)
        return found[0]

    def end(self) -> None:
        """SIGTERM, after which it goes in good order."""
        self.server.terminate()
        assert self.server.wait(60) == 0


def await_that(holds: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.05)


def children(pid: int) -> dict[int, list[str]]:
    """The processes that this one has started, with their command lines."""
    found = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and _stat(int(place.name))[1:2] == [str(pid)]:
            found[int(place.name)] = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
    return found


def is_alive(pid: int) -> bool:
    """False too for one that has ended and that nobody has asked about yet."""
    return _stat(pid)[:1] not in ([], ["Z"], ["X"])


def _stat(pid: int) -> list[str]:
    """State, parent and what follows; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
