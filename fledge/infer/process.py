"""The engine in a process of its own, seen from its client: the HTTP server, a rollout, a command. No torch in here.

The child is `python -m fledge.infer` at the other end of a socket pair (messages.py, worker.py). Its death is seen as
the end of the connection: every call that waits fails with `EngineDied`, and it is started again, with the adapters
and the weights that it was last given. The client's death ends the child in the same way.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from fledge.errors import EngineDied, EngineError, UserError
from fledge.infer import messages
from fledge.infer.given import Given
from fledge.infer.messages import Link, Malformed, ToClient
from fledge.infer.streams import AsyncTokenStream, Item, Listener, TokenStream
from fledge.types import Request, TokenEvent

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "fledge.infer")
# The child ends as soon as the connection does; if it has not by then it is killed.
_FAREWELL_SECONDS = 2.0
# One that died sooner after it was ready is not started again before somebody asks for something.
_STABLE_SECONDS = 1.0


@dataclass(eq=False)
class _Stream:
    """A request whose events come in; `num_open` of its answers have not ended. It dies with its listener."""

    request: Request
    listener: weakref.ref[Listener]
    num_open: int

    def hand(self, item: Item) -> bool:
        """False if nobody listens any more."""
        listener = self.listener()
        if listener is not None:
            listener.hand(item)
        return listener is not None


@dataclass(eq=False)
class _Call:
    """A question; `then` is handed the answer before it is given out."""

    future: Future[Any]
    then: Callable[[Any], None] = lambda answer: None


@dataclass(eq=False)
class _Child:
    """One life of the engine's process, and who waits for something from it."""

    process: subprocess.Popen[bytes]
    link: Link[ToClient]
    ready: Future[messages.Ready] = field(default_factory=Future)
    start_call: int = 0
    ready_at: float | None = None  # time.monotonic()
    streams: dict[int, _Stream] = field(default_factory=dict)
    calls: dict[int, _Call] = field(default_factory=dict)
    last_words: str | None = None

    def mark_ready(self, answer: messages.Ready) -> None:
        self.ready_at = time.monotonic()
        for name, why in answer.lost.items():
            log.error("the restarted engine lacks the adapter '%s': %s", name, why)

    def cause(self, status: int) -> str:
        """What ended the process: its last words, or the signal or exit status."""
        if self.last_words is not None:
            return self.last_words
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"

    def hear(self, message: ToClient) -> None:
        match message:
            case messages.Events(events=events):
                for event in events:
                    self._pass_on(event)
            case messages.Refused(call=call, message=text):
                self._fail(call, UserError(text))
            case messages.Failed(call=call, message=text, is_fatal=is_fatal):
                self.last_words = text if is_fatal else self.last_words
                self._fail(call, EngineError(text))
            case _:
                if (asked := self.calls.pop(message.call, None)) is not None:
                    asked.then(message)
                    asked.future.set_result(message)

    def _pass_on(self, event: TokenEvent) -> None:
        call = int(event.request_id)
        stream = self.streams.get(call)
        if stream is None:
            return  # abandoned
        if not stream.hand(replace(event, request_id=stream.request.id)):
            del self.streams[call]
            self.link.send(messages.Cancel(0, call))
        elif event.finish_reason is not None:
            stream.num_open -= 1
            if stream.num_open == 0:
                del self.streams[call]
                stream.hand(None)

    def _fail(self, call: int, error: Exception) -> None:
        if call == self.start_call:
            self.last_words = str(error)
        if (stream := self.streams.pop(call, None)) is not None:
            stream.hand(error)
        elif (asked := self.calls.pop(call, None)) is not None:
            asked.future.set_exception(error)
        elif call == 0:
            log.error("the engine process: %s", error)


class EngineProcess:
    """The engine, safe to use from any thread. Starting takes as long as loading the model; `close` it in the end.

    What the engine refuses is a `UserError`, its death `EngineDied`; after that it is started again by itself and
    serves whatever is asked from then on, as soon as it is ready.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        config: Mapping[str, Any] | None = None,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
        draft: Path | str | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """`config` are settings of `EngineConfig`, `draft` is the checkpoint of a model that guesses ahead. Raises what
        hinders the start: `UserError` (a damaged checkpoint, an unknown setting) or `EngineError`."""
        small = None if draft is None else str(draft)
        self._start = messages.Start(str(checkpoint), dict(config or {}), device, num_threads, draft=small)
        self._command = tuple(command)
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._is_closed = False
        self._given = Given()  # what a new process is given again
        self._child: _Child | None = self._raise()
        try:
            self._description = self._child.ready.result()
        except BaseException:
            self.close()
            raise

    @property
    def vocab_size(self) -> int:
        return self._description.vocab_size

    @property
    def max_positions(self) -> int | None:
        return self._description.max_positions

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded and the process lives, as far as is known."""
        child = self._child
        return child is not None and child.ready_at is not None

    @property
    def pid(self) -> int | None:
        child = self._child
        return None if child is None else child.process.pid

    def submit(self, request: Request) -> TokenStream:
        """Send a request; iterating gives its events as they come and raises `UserError` if it is refused.

        The events of its answers come mixed, `event.index` tells them apart. Closing or dropping the stream cancels it.
        """
        return TokenStream(self, request)

    def submit_async(self, request: Request) -> AsyncTokenStream:
        """As `submit`, for `async for`; to be called in a running event loop."""
        return AsyncTokenStream(self, request)

    def cancel(self, request_id: str) -> bool:
        """End a live request: its stream ends with `finish_reason` "cancelled". False if there is none of that name."""
        with self._lock:
            child = self._child
            call = None if child is None else _find(child, request_id)
            if child is None or call is None:
                return False
            child.link.send(messages.Cancel(next(self._numbers), call))
            return True

    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Engine.score`. This and the methods below wait for the answer: in asyncio, call them in a thread."""
        asked = [list(row) for row in rows]
        scores: list[list[float]] = self._ask(lambda call: messages.Score(call, asked)).result().rows
        return scores

    def embed(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """(N, D); see `Engine.embed`."""
        asked = [list(row) for row in rows]
        found = self._ask(lambda call: messages.Embed(call, asked)).result()
        return np.frombuffer(found.data, dtype="<f4").reshape(len(rows), found.width)

    def update_weights(self, path: Path | str, version: str) -> None:
        """Take the tensors of a safetensors file between two steps; see `Engine.update_weights`.

        A process that is started again reads it again, so the file must stay, unchanged, until later ones have held
        all its tensors. If it has not, the process cannot be started again, and whoever asks is told so.
        """
        place = str(Path(path).absolute())

        def remember(answer: messages.Updated) -> None:
            self._given.take(messages.Weights(place, version, answer.mark), answer.names)

        self._ask(lambda call: messages.UpdateWeights(call, place, version), remember).result()

    def load_adapter(self, name: str, path: Path | str) -> None:
        """Load a LoRA adapter under a name for `Request.adapter`. It must stay where it is: a process that is started
        again and does not find it refuses the requests that name it."""
        place = str(Path(path).absolute())

        def remember(_: messages.Done) -> None:
            self._given.adapters[name] = place

        self._ask(lambda call: messages.LoadAdapter(call, name, place), remember).result()

    def unload_adapter(self, name: str) -> None:
        def forget(_: messages.Done) -> None:
            self._given.adapters.pop(name, None)

        self._ask(lambda call: messages.UnloadAdapter(call, name), forget).result()

    def stats(self) -> dict[str, int | float | str]:
        """The figures of `EngineStats` by their names."""
        figures: dict[str, int | float | str] = self._ask(messages.Stats).result().figures
        return figures

    def close(self) -> None:
        """End the process; whoever still waits gets an `EngineError`."""
        with self._lock:
            self._is_closed = True
            child = self._child
        if child is not None:
            child.link.close()
            _await_end(child.process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # The calls

    def open(self, request: Request, listener: Listener) -> int:
        """Submit for a listener who is handed what comes, from another thread; returns the call's number."""
        with self._lock:
            child = self._living()
            if _find(child, request.id) is not None:
                raise UserError(f"there is a request '{request.id}' already; give each its own id")
            call = next(self._numbers)
            _send(child, messages.Submit(call, replace(request, id=str(call))))
            child.streams[call] = _Stream(request, weakref.ref(listener), request.n)
            return call

    def abandon(self, call: int) -> None:
        """Nobody listens to this stream any more: cancel it."""
        with self._lock:
            child = self._child
            if child is not None and child.streams.pop(call, None) is not None:
                child.link.send(messages.Cancel(next(self._numbers), call))

    def _ask(self, message: Callable[[int], Struct], then: Callable[[Any], None] = lambda answer: None) -> Future[Any]:
        with self._lock:
            return _put(self._living(), next(self._numbers), message, then)

    # The child's life

    def _living(self) -> _Child:
        """The child to talk to; a new one if the last could not be started."""
        if self._is_closed:
            raise EngineError("the engine is closed")
        if self._child is None:
            self._child = self._raise()
        return self._child

    def _raise(self) -> _Child:
        """Start a process and tell it what the last one knew. Whatever is asked of it waits until it is ready."""
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [*self._command, str(theirs.fileno()), str(os.getpid())]
            # In a session of its own: Ctrl-C is for the client, which then closes the engine in good order.
            process = subprocess.Popen(
                arguments, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        child = _Child(process, Link(ours, ToClient), start_call=next(self._numbers))
        start = structs.replace(
            self._start, call=child.start_call, weights=self._given.weights, adapters=self._given.adapters
        )
        child.ready = _put(child, child.start_call, lambda _: start, child.mark_ready)
        threading.Thread(target=self._listen, args=(child,), name="engine listener", daemon=True).start()
        return child

    def _listen(self, child: _Child) -> None:
        try:
            while True:
                message = child.link.receive()
                with self._lock:
                    child.hear(message)
        except EOFError:
            pass
        except Malformed as error:
            child.last_words = str(error)
        child.link.close()
        self._bury(child, _await_end(child.process))

    def _bury(self, child: _Child, status: int) -> None:
        """Tell everybody who waits for it, and start the next one."""
        with self._lock:
            if self._child is child:
                self._child = None
            streams, calls = dict(child.streams), dict(child.calls)
            child.streams.clear()
            child.calls.clear()
        if not self._is_closed:
            log.error("the engine process ended: %s", child.cause(status))
        for stream in streams.values():
            stream.hand(self._obituary(child, status))
        for call in calls.values():
            call.future.set_exception(self._obituary(child, status))
        if child.ready_at is not None and time.monotonic() - child.ready_at > _STABLE_SECONDS:
            with self._lock, suppress(EngineError):  # closed meanwhile
                self._living()

    def _obituary(self, child: _Child, status: int) -> EngineError:
        if self._is_closed:
            return EngineError("the engine was closed before this was answered")
        if child.ready_at is None:
            return EngineError(f"the engine process could not be started: {child.cause(status)}")
        return EngineDied(
            f"the engine process ended before this was answered ({child.cause(status)}); it is started again, "
            "so send the request again"
        )


def _find(child: _Child, request_id: str) -> int | None:
    return next((call for call, stream in child.streams.items() if stream.request.id == request_id), None)


def _put(
    child: _Child, call: int, message: Callable[[int], Struct], then: Callable[[Any], None] = lambda answer: None
) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()  # nobody can take it back any more
    child.calls[call] = _Call(future, then)
    try:
        _send(child, message(call))
    except UserError:
        del child.calls[call]
        raise
    return future


def _send(child: _Child, message: Struct) -> None:
    try:
        child.link.send(message)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"this cannot be sent to the engine: {error}") from error


def _await_end(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(_FAREWELL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
