"""The moderation model of a server: one process that embeds, a head in this one, and verdicts remembered for a while.

It is started when something is first judged. What was judged once is not judged again soon, so that the earlier turns
of a conversation cost nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fledge.infer.process import EngineProcess
from fledge.safety.classifier import Classifier, Verdict, read_classifier
from fledge.serve.engine import ProcessEngine
from fledge.serve.errors import ApiError

COMMAND = "fledge moderation train RUN"
_REMEMBERED = 4096
_CACHE_BYTES = 16 << 20  # the engine generates nothing here


class Embedder(Protocol):
    """What is asked of the model's engine (serve/engine.py)."""

    async def embed(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]: ...
    async def close(self) -> None: ...


class Moderator:
    """Judges texts. `start` gives the engine; it is called once, when the first text comes."""

    def __init__(self, classifier: Classifier, start: Callable[[], Awaitable[Embedder]]) -> None:
        self.classifier = classifier
        self._start = start
        self._engine: Embedder | None = None
        self._lock = asyncio.Lock()
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()

    @property
    def name(self) -> str:
        return self.classifier.info.name

    @property
    def thresholds(self) -> dict[str, float]:
        return self.classifier.thresholds

    async def judge(self, texts: Sequence[str]) -> list[Verdict]:
        """A verdict a text, in order. `EngineError` if the model's process cannot answer."""
        keys = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        found = dict(zip(new, await self._judge_new(list(new.values())), strict=True)) if new else {}
        verdicts = [found.get(key) or self._known[key] for key in keys]
        for key, verdict in zip(keys, verdicts, strict=True):
            self._known[key] = verdict
            self._known.move_to_end(key)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return verdicts

    async def num_tokens(self, texts: Sequence[str]) -> int:
        rows = await asyncio.to_thread(lambda: [row for text in texts for row in self.classifier.rows(text)])
        return sum(map(len, rows))

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

    async def _judge_new(self, texts: list[str]) -> list[Verdict]:
        rows_of = await asyncio.to_thread(lambda: [self.classifier.rows(text) for text in texts])
        rows = [row for own in rows_of for row in own]
        async with self._lock:
            if self._engine is None:
                self._engine = await self._start()
        vectors = await self._engine.embed(rows) if rows else np.zeros((0, 0), np.float32)
        verdicts, place = [], 0
        for text, own in zip(texts, rows_of, strict=True):
            verdicts.append(self.classifier.verdict(text, vectors[place : place + len(own)]))
            place += len(own)
        return verdicts


def open_moderator(
    folder: Path, *, thresholds: Mapping[str, float] | None = None, device: str = "cpu", num_threads: int | None = None
) -> Moderator:
    """The moderation model in a folder of `fledge moderation train`; `UserError` for one that cannot be used."""

    async def start() -> Embedder:
        config = {"cache_bytes": _CACHE_BYTES}
        process = await asyncio.to_thread(
            EngineProcess, folder / "model", config, device=device, num_threads=num_threads
        )
        return ProcessEngine(process)

    return Moderator(read_classifier(folder, thresholds), start)


def no_moderation() -> ApiError:
    """503: the operator has to make a model first, so trying again does not help."""
    message = f"This server has no moderation model; its operator makes one with `{COMMAND}`"
    headers = {"x-should-retry": "false"}
    return ApiError(503, message, code="moderation_unavailable", headers=headers)
