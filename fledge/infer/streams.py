"""The events of one request as they come out of the engine's process, for threads and for asyncio.

`EngineProcess.submit` and `submit_async` (process.py) make them. Events are handed over by the thread that listens to
the engine and wait here until they are asked for, so a slow reader keeps nobody waiting but himself.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Protocol, Self

from fledge.types import Request, TokenEvent

Item = TokenEvent | Exception | None  # an event, the error that ends the stream, or its end


class Listener(Protocol):
    def hand(self, item: Item) -> None:
        """Take an item; called by another thread, must not wait."""


class Opener(Protocol):
    """What a stream asks of the engine's client. A listener that is gone is noticed at the next event."""

    def open(self, request: Request, listener: Listener) -> int: ...
    def abandon(self, call: int) -> None: ...


class TokenStream(Iterator[TokenEvent]):
    """Events of one request. To be read by one thread at a time; closing it early cancels the request."""

    def __init__(self, engine: Opener, request: Request) -> None:
        self._engine = engine
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._call: int | None = engine.open(request, self)  # None: ended

    def hand(self, item: Item) -> None:
        self._items.put(item)

    def __next__(self) -> TokenEvent:
        if self._call is None:
            raise StopIteration
        item = self._items.get()
        if isinstance(item, TokenEvent):
            return item
        self._call = None
        raise StopIteration if item is None else item

    def close(self) -> None:
        """Cancel the request unless it has ended."""
        call, self._call = self._call, None
        if call is not None:
            self._engine.abandon(call)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class AsyncTokenStream(AsyncIterator[TokenEvent]):
    """As `TokenStream`, for the event loop in which it was made."""

    def __init__(self, engine: Opener, request: Request) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item] = asyncio.Queue()
        self._call: int | None = engine.open(request, self)  # None: ended

    def hand(self, item: Item) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nobody waits
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def __anext__(self) -> TokenEvent:
        if self._call is None:
            raise StopAsyncIteration
        item = await self._items.get()
        if isinstance(item, TokenEvent):
            return item
        self._call = None
        raise StopAsyncIteration if item is None else item

    async def aclose(self) -> None:
        """Cancel the request unless it has ended. To be called when the reader gives up, as on a lost connection."""
        call, self._call = self._call, None
        if call is not None:
            self._engine.abandon(call)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()
