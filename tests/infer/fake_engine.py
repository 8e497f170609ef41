"""A hosted engine without a model, run as a process: `python fake_engine.py DESCRIPTOR PARENT`.

Token n of the answer to a prompt is the prompt's first id plus n, until `max_tokens`. Certain first ids make trouble.
A file of weights holds names of tensors, whose values are then the version.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fledge.errors import UserError
from fledge.infer import worker
from fledge.infer.messages import Start
from fledge.types import Grammar, Request, TokenEvent

VOCAB = 1000
STEP_FAILS, SUBMIT_FAILS, NOT_A_NUMBER = 990, 991, 992


@dataclass(frozen=True)
class FakeStats:
    num_live: int
    num_pauses: int
    num_steps: int
    weights_version: str
    adapters: str
    tensors: str


class FakeEngine:
    vocab_size = VOCAB
    max_positions = 64

    def __init__(self, start: Start) -> None:
        self._step_seconds = float(start.config.get("step_seconds", 0.001))
        self._finished_path = start.config.get("finished_path")
        self._live: dict[str, tuple[Request, int]] = {}
        self._outbox: list[TokenEvent] = []
        self._num_steps = 0
        self._read_after: set[int] = set()  # the numbers of steps
        self._version = ""
        self._tensors: dict[str, str] = {}
        self._adapters: dict[str, str] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._outbox)

    def is_prepared(self, grammar: Grammar) -> bool:
        return grammar.text == "known"

    def prepare(self, grammar: Grammar) -> None:
        """A regular expression may be the path of a file that is waited for."""
        deadline = time.monotonic() + 30
        while grammar.text.startswith("/") and not Path(grammar.text).exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        if grammar.kind == "lark":
            raise UserError("the grammar cannot be used: it is too complex")
        if grammar.kind == "json_object":
            raise RuntimeError("out of memory")

    def submit(self, request: Request) -> None:
        if request.prompt_ids[0] == SUBMIT_FAILS:
            raise RuntimeError("out of luck")
        if max(request.prompt_ids) >= VOCAB:
            raise UserError(f"id {max(request.prompt_ids)} is outside the vocabulary of {VOCAB}")
        self._live[request.id] = request, 0

    def cancel(self, request_id: str) -> bool:
        found = self._live.pop(request_id, None)
        if found is not None:
            self._outbox += [TokenEvent(-1, 0.0, "", "cancelled", request_id, index) for index in range(found[0].n)]
        return found is not None

    def step(self) -> list[TokenEvent]:
        time.sleep(self._step_seconds)
        self._num_steps += 1
        events, self._outbox = self._outbox, []
        for request, num_said in list(self._live.values()):
            events += self._say(request, num_said)
        return events

    def _say(self, request: Request, num_said: int) -> list[TokenEvent]:
        first = request.prompt_ids[0]
        if first == STEP_FAILS:
            raise RuntimeError("the accelerator is on fire")
        reason = "length" if num_said + 1 == request.params.max_tokens else None
        if first == NOT_A_NUMBER:
            reason = "error"
        self._live[request.id] = request, num_said + 1
        if reason is not None:
            del self._live[request.id]
            if self._finished_path:
                Path(self._finished_path).touch()
        token = -1 if reason == "error" else first + num_said
        return [TokenEvent(token, -0.5, f"{token} ", reason, request.id, index) for index in range(request.n)]

    def score(self, rows: list[list[int]]) -> list[list[float]]:
        return [[-float(id) for id in row[1:]] for row in rows]

    def embed(self, rows: list[list[int]]) -> list[list[float]]:
        if rows and max(map(max, rows)) >= VOCAB:
            raise UserError("no such id")
        self._read_after.add(self._num_steps)
        return [[float(len(row)), float(row[0]), 0.5] for row in rows]

    def update_weights(self, path: str, version: str) -> list[str]:
        if not Path(path).is_file():
            raise UserError(f"{path}: missing")
        names = Path(path).read_text().split()
        self._tensors |= dict.fromkeys(names, version)
        self._version = version
        return names

    def load_adapter(self, name: str, path: str) -> None:
        if not Path(path).exists():
            raise UserError(f"{path}: missing")
        self._adapters[name] = path

    def unload_adapter(self, name: str) -> None:
        if self._adapters.pop(name, None) is None:
            raise UserError(f"no adapter '{name}' is loaded")

    def stats(self) -> FakeStats:
        adapters = " ".join(sorted(self._adapters))
        tensors = " ".join(f"{name}={version}" for name, version in sorted(self._tensors.items()))
        return FakeStats(len(self._live), len(self._read_after), self._num_steps, self._version, adapters, tensors)


def load(start: Start) -> FakeEngine:
    if start.checkpoint == "missing":
        raise UserError("missing: not a checkpoint")
    if start.checkpoint == "crash":
        os._exit(3)
    if start.checkpoint == "slow":
        time.sleep(0.5)
    return FakeEngine(start)


if __name__ == "__main__":
    worker.run(sys.argv[1:], load)
