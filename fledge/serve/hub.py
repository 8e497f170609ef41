"""The models of a server: found by name, loaded when first asked for, and put away when memory is needed.

A name leads over aliases to a checkpoint folder. What a model needs is estimated by the size of its files and its
cache; before one is loaded that does not fit into the budget, the models that nobody uses go, longest unused first.
Where all are in use it waits for them to be left, and who asks later for any model waits behind it, unless that one has
just been loaded: so models that do not fit side by side take turns of some seconds, and none starves.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fledge.errors import EngineError, UserError
from fledge.serve.engine import ServedModel
from fledge.serve.errors import ApiError, refused
from fledge.store import models as stored
from fledge.store.database import Database
from fledge.store.tables import ModelRow

log = logging.getLogger(__name__)

_MAX_ALIASES = 8  # that lead from one to the next
_PATIENCE_SECONDS = 30.0  # of a request that waits for room
_TURN_SECONDS = 5.0  # that a model is open to all after it was loaded


@dataclass(frozen=True)
class ModelEntry:
    """A name and what it stands for: a checkpoint folder, another name, or that with the PEFT adapter in a folder."""

    name: str
    created_at: int
    owned_by: str
    path: Path | None = None
    target: str | None = None
    adapter: Path | None = None
    is_deletable: bool = False


class Loader(Protocol):
    """How checkpoints become models that are served."""

    def size(self, path: Path) -> int:
        """About how many bytes of memory the model will take."""

    async def load(self, name: str, path: Path) -> ServedModel:
        """`UserError` for a checkpoint that cannot be used."""

    async def adapt(self, model: ServedModel, name: str, adapter: Path) -> ServedModel:
        """The model with the adapter of a folder, on the same engine. `UserError` if it does not fit."""


@dataclass(eq=False)
class _Held:
    """A model in memory, or on its way there."""

    size: int
    task: asyncio.Task[ServedModel]
    turn_ends: float = math.inf  # the event loop's time
    num_users: int = 0
    used_at: int = 0  # counts uses, not seconds
    adapted: dict[str, asyncio.Task[ServedModel]] = field(default_factory=dict)  # by the name of the adapter's entry


class Hub:
    """`own` are the models that the server was started with; the first of them is the default.

    A model for which there is no room within `max_bytes` is waited for up to `patience` seconds; one that has been
    loaded is open for `turn` seconds to those who come after.
    """

    def __init__(
        self,
        database: Database,
        loader: Loader,
        own: Sequence[ModelEntry],
        max_bytes: int | None,
        patience: float = _PATIENCE_SECONDS,
        turn: float = _TURN_SECONDS,
    ) -> None:
        self._database, self._loader, self._max_bytes = database, loader, max_bytes
        self._patience, self._turn = patience, turn
        self._own: Mapping[str, ModelEntry] = {entry.name: entry for entry in own}
        self._held: dict[Path, _Held] = {}
        self._num_uses = 0
        self._line = asyncio.Lock()  # at its head may stand one who waits for room, and nobody passes
        self._left = asyncio.Event()  # somebody has left a model

    @property
    def default(self) -> str | None:
        return next(iter(self._own), None)

    def name_for(self, given: str | None) -> str:
        """The name, or that of the default model where none is given; 400 if there is none."""
        name = given or self.default
        if name is None:
            message = "Missing required parameter: 'model'; the server was started without one"
            raise refused(message, "model", "missing_required_parameter")
        return name

    @property
    def is_ready(self) -> bool:
        """Whether every model that was loaded has an engine that lives."""
        loaded = [held.task.result() for held in self._held.values() if _is_loaded(held)]
        return all(model.engine.is_ready for model in loaded)

    def loaded(self) -> list[ServedModel]:
        return [held.task.result() for held in self._held.values() if _is_loaded(held)]

    async def find(self, owner: str, name: str) -> ModelEntry:
        """The model of this name that the owner may use; 404 if there is none."""
        entry = self._own.get(name)
        if entry is None:
            row = await stored.find_model(self._database, owner, name) if "\0" not in name else None
            entry = None if row is None else _entry(row, owner)
        if entry is None:
            message = f"The model '{name[:200]}' does not exist or you do not have access to it"
            raise ApiError(404, message, param="model", code="model_not_found", kind="invalid_request_error")
        return entry

    async def available(self, owner: str) -> Sequence[ModelEntry]:
        rows = await stored.list_models(self._database, owner)
        return [*self._own.values(), *(_entry(row, owner) for row in rows if row.id not in self._own)]

    async def delete(self, owner: str, name: str) -> bool:
        """False if it is none of the owner's own."""
        return name not in self._own and await stored.delete_model(self._database, owner, name)

    async def path_of(self, owner: str, name: str) -> Path:
        """The checkpoint that a name leads to; 400 if there is more to the model, an adapter."""
        path, _, adapted = await self._resolve(owner, name)
        if adapted is not None:
            raise refused(f"The model '{name[:200]}' is '{adapted.target}' with an adapter: name that one", "model")
        return path

    async def _resolve(self, owner: str, name: str) -> tuple[Path, str, ModelEntry | None]:
        """The checkpoint that a name leads to, its own name, and the entry on the way there that adds an adapter."""
        entry, adapted = await self.find(owner, name), None
        for _ in range(_MAX_ALIASES):
            if entry.target is None:
                break
            adapted = entry if entry.adapter is not None else adapted
            entry = await self.find(owner, entry.target)
        if entry.path is None:
            raise ApiError(500, f"The model '{name[:200]}' is an alias that leads nowhere", code="internal_error")
        return entry.path, entry.name, adapted

    @asynccontextmanager
    async def use(self, owner: str, name: str) -> AsyncIterator[ServedModel]:
        """The model, loaded, which stays so within this block. 404, 400 for a damaged one, 503 if memory is short."""
        path, own_name, adapted = await self._resolve(owner, name)
        held = await self._enter(path, own_name)
        try:
            model = await asyncio.shield(held.task)
            yield model if adapted is None else await self._adapted(held, model, adapted)
        finally:
            held.num_users -= 1
            self._left.set()

    async def warm(self, name: str) -> None:
        """Load a model that the server was started with."""
        async with self.use("", name):
            pass

    async def close(self) -> None:
        held, self._held = list(self._held.values()), {}
        for one in held:
            await _put_away(one)

    async def _enter(self, path: Path, name: str) -> _Held:
        """What is held of a checkpoint, with one user more; if nothing is, loading begins."""
        now = asyncio.get_running_loop().time()
        held = self._held.get(path)
        if held is not None and not _has_failed(held) and now < held.turn_ends:
            return self._join(held)
        async with self._line:
            held = self._held.get(path)
            if held is None or _has_failed(held):
                held = await self._begin(path, name, now + self._patience)
            return self._join(held)

    def _join(self, held: _Held) -> _Held:
        held.num_users += 1
        self._num_uses += 1
        held.used_at = self._num_uses
        return held

    async def _begin(self, path: Path, name: str, until: float) -> _Held:
        """Start loading. Nothing is awaited between the look at who goes and the new entry in what is held."""
        size = await asyncio.to_thread(self._loader.size, path)
        going = self._to_evict(path, size)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while going is None:
                    self._left.clear()
                    await self._left.wait()
                    going = self._to_evict(path, size)
        if going is None:
            headers = {"retry-after": "5"}
            message = "Other models are in use and there is no memory for this one; try again"
            raise ApiError(503, message, code="no_memory", headers=headers)
        for old in going:
            log.info("%s is put away", old)
        gone = [self._held.pop(old) for old in going]
        begun = _Held(size, asyncio.create_task(self._load(path, name, gone)))
        begun.task.add_done_callback(lambda _: self._open(begun))
        self._held[path] = begun
        return begun

    def _open(self, held: _Held) -> None:
        """It has been loaded: its turn begins."""
        held.turn_ends = asyncio.get_running_loop().time() + self._turn

    async def _adapted(self, held: _Held, model: ServedModel, entry: ModelEntry) -> ServedModel:
        """The model with an entry's adapter, which is loaded when it is first asked for."""
        task = held.adapted.get(entry.name)
        if task is None or (task.done() and task.exception() is not None):
            task = held.adapted[entry.name] = asyncio.create_task(self._adapt(model, entry))
        return await asyncio.shield(task)

    async def _adapt(self, model: ServedModel, entry: ModelEntry) -> ServedModel:
        assert entry.adapter is not None
        try:
            return await self._loader.adapt(model, entry.name, entry.adapter)
        except (UserError, EngineError) as error:
            raise _unavailable(entry.adapter, error) from error

    async def _load(self, path: Path, name: str, gone: Sequence[_Held]) -> ServedModel:
        for old in gone:
            await _put_away(old)
        log.info("loading %s", path)
        try:
            return await self._loader.load(name, path)
        except (UserError, EngineError) as error:
            raise _unavailable(path, error) from error

    def _to_evict(self, path: Path, size: int) -> list[Path] | None:
        """Whom to put away so that `size` more bytes fit; None if too many are in use."""
        others = {other: held for other, held in self._held.items() if other != path}
        total = size + sum(held.size for held in others.values())
        going: list[Path] = []
        if self._max_bytes is None:
            return going
        idle = [other for other, held in others.items() if held.num_users == 0 and held.task.done()]
        for other in sorted(idle, key=lambda other: others[other].used_at):
            if total <= self._max_bytes:
                break
            going.append(other)
            total -= others[other].size
        return None if total > self._max_bytes and len(going) < len(others) else going


def _is_loaded(held: _Held) -> bool:
    return held.task.done() and not held.task.cancelled() and held.task.exception() is None


def _has_failed(held: _Held) -> bool:
    return held.task.done() and not _is_loaded(held)


def _unavailable(path: Path, error: Exception) -> ApiError:
    """The checkpoint is the operator's matter: the client learns nothing of paths and hashes."""
    log.error("%s cannot be loaded: %s", path, error)
    return ApiError(503, "The model cannot be loaded; the server's log says why", code="model_unavailable")


async def _put_away(held: _Held) -> None:
    if not held.task.done():
        held.task.cancel()
        await asyncio.wait((held.task,))
    if _is_loaded(held):
        await held.task.result().engine.close()


def _entry(row: ModelRow, owner: str) -> ModelEntry:
    path = None if row.path is None else Path(row.path)
    return ModelEntry(row.id, row.created_at, row.owned_by, path, row.target, is_deletable=row.owner == owner)
