"""What the server knows of an engine, and of a model that one serves. No torch.

`infer.process.EngineProcess` stands behind `ProcessEngine`; tests put a fake in its place (docs/architecture.md,
seam 3).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fledge.infer.process import EngineProcess
from fledge.text.chat import Renderer
from fledge.text.tokenizer import Tokenizer
from fledge.text.tools import STYLES, CallStyle
from fledge.types import Request, TokenEvent

Figures = Mapping[str, int | float | str]
FIM_NAMES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


class EventStream(Protocol):
    """The events of one request. `aclose` ends the request unless it has ended; its blocks are free one step later."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...
    async def __anext__(self) -> TokenEvent: ...
    async def aclose(self) -> None: ...


class Engine(Protocol):
    """Nothing here waits for a forward pass but the awaitable calls."""

    @property
    def is_ready(self) -> bool: ...
    def submit(self, request: Request) -> EventStream:
        """Errors are raised by the stream: `UserError` for a request that can never run, `EngineDied`."""

    async def embed(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """(N, D), each row of length 1."""

    async def load_adapter(self, name: str, path: Path) -> None:
        """Hold the PEFT adapter of a folder for requests that name it. `UserError` if it does not fit."""

    async def stats(self) -> Figures: ...
    async def close(self) -> None: ...


@dataclass(frozen=True)
class ServedModel:
    """A model that is loaded, under its own name, not an alias of it.

    `context` is how many positions a sequence of it may have, None without a limit. `style` is how it writes calls;
    `fim_ids` are the tokens by which it was taught to fill in, None if it was not. `fingerprint` names its weights.
    """

    name: str
    renderer: Renderer
    engine: Engine
    context: int | None
    fingerprint: str
    style: CallStyle = STYLES["fledge"]
    fim_ids: tuple[int, int, int] | None = None
    adapter: str | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.renderer.tokenizer

    @property
    def label(self) -> str:
        """What it is counted as, whichever of its names was asked for."""
        return self.adapter or self.name


class ProcessEngine:
    """`EngineProcess` for asyncio: its calls that wait for an answer do so in a thread."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process

    @property
    def is_ready(self) -> bool:
        return self._process.is_ready

    def submit(self, request: Request) -> EventStream:
        return self._process.submit_async(request)

    async def embed(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        return await asyncio.to_thread(self._process.embed, rows)

    async def load_adapter(self, name: str, path: Path) -> None:
        await asyncio.to_thread(self._process.load_adapter, name, path)

    async def stats(self) -> Figures:
        return await asyncio.to_thread(self._process.stats)

    async def close(self) -> None:
        await asyncio.to_thread(self._process.close)
