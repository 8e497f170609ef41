"""Asking verifiers about answers, from the trainer's side: a few sandbox processes, restarted when they fail.

A verdict has a score, or none and a reason; no failure ever becomes a score of 0. See sandbox.py for the other side.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import fledge
from fledge.errors import ConfigError, nearest
from fledge.rl.confine import can_filter
from fledge.rl.verifier import OPTIONS, VERIFIERS

GRACE_SECONDS = 5.0  # beyond an answer's own time, before a sandbox that says nothing is given up


@dataclass(frozen=True)
class Limits:
    """What one answer may use. `filtered`: without a filter of system calls nothing is judged (see confine.py)."""

    seconds: float = 5.0
    memory_bytes: int = 1 << 29
    filtered: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf") or self.memory_bytes < 1 << 26:
            raise ValueError(f"limits need positive seconds and at least 64 MiB, got {self}")


@dataclass(frozen=True)
class Verifier:
    """One of verifier.py's by `name`, with its options; `custom` takes `path` (a Python file) and `function`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.name not in VERIFIERS:
            raise ConfigError(f"no verifier is called '{self.name}'; {nearest(self.name, VERIFIERS)}")
        for option in self.options.keys() - OPTIONS[self.name]:
            raise ConfigError(
                f"the verifier '{self.name}' has no option '{option}'; {nearest(option, OPTIONS[self.name])}"
            )
        if self.name == "custom" and not {"path", "function"} <= self.options.keys():
            raise ConfigError("the verifier 'custom' needs the options path (a Python file) and function")
        if self.limits.filtered and not can_filter():
            raise ConfigError("verifiers need Linux on x86-64 or 64-bit ARM; filtered=false leaves out the filter")


@dataclass(frozen=True)
class Verdict:
    """`score` is None if there is none; `reason` says why it is that, or why it is not full."""

    score: float | None
    reason: str | None


class Judge:
    """Up to `workers` sandboxes, each started when first needed. A context manager, or `close()` it."""

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or os.cpu_count() or 1
        self._idle: queue.SimpleQueue[_Sandbox] = queue.SimpleQueue()
        for _ in range(self._workers):
            self._idle.put(_Sandbox())
        self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="judge")

    def __call__(self, verifier: Verifier, answers: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Verdict]:
        """A verdict on each (completion, record), in order."""
        return list(self._threads.map(lambda answer: self._one(verifier, *answer), answers))

    def submit(self, verifier: Verifier, completion: str, record: Mapping[str, Any]) -> Future[Verdict]:
        """One verdict, to be waited for elsewhere; it takes its turn among the workers."""
        return self._threads.submit(self._one, verifier, completion, record)

    def _one(self, verifier: Verifier, completion: str, record: Mapping[str, Any]) -> Verdict:
        sandbox = self._idle.get()
        try:
            return sandbox.ask(verifier, completion, record)
        finally:
            self._idle.put(sandbox)

    def close(self) -> None:
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Sandbox:
    """One server process, running or not."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, verifier: Verifier, completion: str, record: Mapping[str, Any]) -> Verdict:
        request = {
            "verifier": verifier.name,
            "completion": completion,
            "record": dict(record),
            "options": dict(verifier.options),
            "seconds": verifier.limits.seconds,
            "memory_bytes": verifier.limits.memory_bytes,
            "filtered": verifier.limits.filtered,
        }
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError) as error:
            return Verdict(None, f"the record is no JSON: {error}")
        try:
            reply = json.loads(self._exchange(line, verifier.limits.seconds + GRACE_SECONDS))
            return Verdict(reply["score"], reply["reason"])
        except (OSError, ValueError, TimeoutError) as error:
            self.stop()
            return Verdict(None, f"the sandbox failed: {error or type(error).__name__}")

    def _exchange(self, line: bytes, seconds: float) -> bytes:
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line)
        process.stdin.flush()
        # One request at a time, one line an answer, written at once: if something can be read, a line can.
        if not select.select([process.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"nothing was said for {seconds:g} seconds")
        return process.stdout.readline()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            ours = str(Path(fledge.__file__).parents[1])
            environment = {"PYTHONPATH": ours, "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-m", "fledge.rl.sandbox"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is the trainer's to handle
            )
        return self._process

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
