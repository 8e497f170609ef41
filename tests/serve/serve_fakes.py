"""A server without a model: an engine that speaks a fixed text, over a tiny tokenizer. No torch."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray

from fledge.errors import EngineDied, UserError
from fledge.safety.categories import NAMES
from fledge.safety.classifier import Verdict
from fledge.serve.app import make_app, make_state
from fledge.serve.engine import FIM_NAMES, Figures, ServedModel
from fledge.serve.hub import ModelEntry
from fledge.serve.moderation import Moderator
from fledge.serve.state import ServerConfig, State
from fledge.store.blobs import Blobs
from fledge.store.database import Database, sqlite_url
from fledge.store.keys import KeyRequest, create_key
from fledge.text.chat import ChatRenderer
from fledge.text.subwords import TokenizerConfig
from fledge.text.tokenizer import StreamDecoder, Tokenizer, train_tokenizer
from fledge.types import Request, TokenEvent, TokenLogprobs

TEXT = "The quick brown fox jumps over the lazy dog. 你好，世界！ "


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 20], TokenizerConfig(vocab_size=400))


class FakeStream:
    """The fake's answer to one request, token by token; every answer of it says the same."""

    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self._engine, self._request = engine, request
        self._events = self._speak()

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        return await self._events.__anext__()

    async def aclose(self) -> None:
        if self._request.id in self._engine.live:
            self._engine.live.discard(self._request.id)
            self._engine.cancelled.append(self._request.id)
        await self._events.aclose()

    async def _speak(self) -> AsyncIterator[TokenEvent]:
        engine, request = self._engine, self._request
        if engine.refusal is not None:
            raise UserError(engine.refusal)
        engine.live.add(request.id)
        engine.requests.append(request)
        ids = engine.ids_for(request)
        decoders = [StreamDecoder(tokenizer()) for _ in range(request.n)]
        prompt = tuple(TokenLogprobs(-1.0, 1, ((i, -1.0),)) for i in request.prompt_ids[1:])
        for place, token in enumerate(ids):
            await engine.pause(place)
            for index in range(request.n):
                yield self._event(place, token, ids, index, decoders[index].push(token), prompt)
        engine.live.discard(request.id)

    def _event(
        self,
        place: int,
        token: int,
        ids: Sequence[int],
        index: int,
        text: str,
        prompt: tuple[TokenLogprobs, ...],
    ) -> TokenEvent:
        request = self._request
        is_last = place == len(ids) - 1
        reason: Any = None
        if is_last:
            reason = "stop" if token in request.stop_ids else "length"
        k = request.top_logprobs
        told = None if k is None else TokenLogprobs(-0.5, 1, tuple((i, -float(i + 1)) for i in range(k)))
        is_first = place == 0 and index == 0
        shown = prompt if is_first and request.prompt_logprobs is not None else ()
        return TokenEvent(token, -0.5, text, reason, request.id, index, told, shown, 1 if is_first else 0)


class FakeEngine:
    """Says `text` and ends. `pause` is awaited before every token, `refusal` refuses whatever is asked."""

    def __init__(self, text: str = "Hello, world! 你好") -> None:
        self.text = text
        self.live: set[str] = set()
        self.cancelled: list[str] = []
        self.requests: list[Request] = []
        self.refusal: str | None = None
        self.is_ready = True
        self.is_closed = False
        self.gate: asyncio.Event | None = None
        self.gate_place = 0
        self.dies_at: int | None = None
        self.delay_seconds = 0.0

    def ids_for(self, request: Request) -> list[int]:
        ids = tokenizer().encode(self.text)
        end = next(iter(sorted(request.stop_ids)), None)
        if end is not None and len(ids) < request.params.max_tokens:
            ids.append(end)
        return ids[: request.params.max_tokens]

    async def pause(self, place: int) -> None:
        if self.dies_at == place:
            raise EngineDied("the engine process ended before this was answered")
        if self.gate is not None and place >= self.gate_place:
            await self.gate.wait()
        await asyncio.sleep(self.delay_seconds)

    def submit(self, request: Request) -> FakeStream:
        return FakeStream(self, request)

    async def embed(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """A direction that follows from the ids alone."""
        seeds = [int.from_bytes(hashlib.sha256(repr(list(row)).encode()).digest()[:4], "little") for row in rows]
        drawn = np.stack([np.random.default_rng(seed).normal(size=8) for seed in seeds]).astype(np.float32)
        return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), np.float32)

    async def stats(self) -> Figures:
        return {"num_running": len(self.live), "num_waiting": 0, "num_blocks": 100, "num_free_blocks": 75}

    async def close(self) -> None:
        self.is_closed = True


class FakeLoader:
    """Every path is a model over one engine, with all the tricks that a model may have."""

    def __init__(self, engine: FakeEngine | None = None) -> None:
        self.engine = engine or FakeEngine()
        self.loaded: list[Path] = []
        self.adapted: list[str] = []

    def size(self, path: Path) -> int:
        return 100

    async def adapt(self, model: ServedModel, name: str, adapter: Path) -> ServedModel:
        self.adapted.append(name)
        if adapter.name == "damaged":
            raise UserError(f"{adapter}: holds no adapter")
        return replace(model, adapter=name)

    async def load(self, name: str, path: Path) -> ServedModel:
        self.loaded.append(path)
        fim = tuple(tokenizer().special_id(name) for name in FIM_NAMES)
        renderer = ChatRenderer(tokenizer())
        return ServedModel(name, renderer, self.engine, 4096, "f" * 64, fim_ids=fim)  # type: ignore[arg-type]


class WordClassifier:
    """Flags `hate` where a text says "hateful", `violence` where it says "violent" (or 暴力); else scores 0.01."""

    WORDS = (("hate", "hateful"), ("violence", "violent"), ("violence", "暴力"))

    def __init__(self, name: str = "words") -> None:
        self.info = SimpleNamespace(name=name)
        self.thresholds = dict.fromkeys(NAMES, 0.5)
        self.judged: list[str] = []

    def rows(self, text: str) -> list[list[int]]:
        return [tokenizer().encode(text)] if text else []

    def verdict(self, text: str, vectors: NDArray[np.float32]) -> Verdict:
        assert len(vectors) == len(self.rows(text))
        self.judged.append(text)
        flagged = tuple(dict.fromkeys(name for name, word in self.WORDS if word in text))
        return Verdict({name: 0.9 if name in flagged else 0.01 for name in NAMES}, flagged)


def word_moderator(engine: FakeEngine | None = None, name: str = "words") -> Moderator:
    async def start() -> FakeEngine:
        return engine or FakeEngine()

    return Moderator(WordClassifier(name), start)  # type: ignore[arg-type]


def entries(*names: str) -> list[ModelEntry]:
    return [ModelEntry(name, 1_700_000_000, "fledge", path=Path(name)) for name in names]


Client = Callable[[str], httpx2.AsyncClient]


class Server:
    """An app with its parts, two users and clients for them."""

    def __init__(self, state: State, app: FastAPI, loader: FakeLoader, keys: dict[str, str]) -> None:
        self.state, self.app, self.loader, self.keys = state, app, loader, keys
        self.loop: asyncio.AbstractEventLoop  # that of a server behind a socket (fake_server.py)

    @property
    def engine(self) -> FakeEngine:
        return self.loader.engine

    def client(self, user: str | None = "alice") -> httpx2.AsyncClient:
        headers = {} if user is None else {"authorization": f"Bearer {self.keys[user]}"}
        transport = httpx2.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx2.AsyncClient(transport=transport, base_url="http://fledge", headers=headers)


@asynccontextmanager
async def serving(
    folder: Path, config: ServerConfig | None = None, engine: FakeEngine | None = None
) -> AsyncIterator[Server]:
    """A running server in this process, with the users alice and bob."""
    database = Database(sqlite_url(folder / "fledge.db"))
    await database.open()
    loader = FakeLoader(engine)
    state = make_state(
        config or ServerConfig(drain_seconds=0.5),
        database,
        Blobs(folder / "blobs"),
        loader,
        entries("fake"),
        moderator=word_moderator(),
    )
    app = make_app(state)
    keys = {user: (await create_key(database, KeyRequest(user)))[0] for user in ("alice", "bob")}
    try:
        async with app.router.lifespan_context(app):
            yield Server(state, app, loader, keys)
    finally:
        await database.close()
