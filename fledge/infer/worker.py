"""The engine's side of the process boundary: read messages, run steps, send what comes of them. No torch in here.

Started by process.py as `python -m fledge.infer` (see __main__.py), which hands it `hosted.load`. One thread reads, one
writes (messages.Link), and the main thread alone touches the engine: whatever has come in is dealt with between two
steps, so that a cancellation takes effect within one. Nothing that a client sends ends the process; the client's end
does, at once.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike

from fledge.errors import UserError
from fledge.infer import messages
from fledge.infer.messages import Link, Malformed, ToEngine
from fledge.types import Request, TokenEvent

log = logging.getLogger(__name__)

# What could not be written within this time when the process ends is lost: the client has stopped reading.
_FLUSH_SECONDS = 5.0
# How often the process looks whether its parent is still the one that started it.
_PARENT_SECONDS = 1.0


class Hosted(Protocol):
    """The engine as the worker sees it (hosted.py). Every method raises `UserError` for what it refuses."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_positions(self) -> int | None: ...
    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> bool: ...
    def step(self) -> list[TokenEvent]: ...
    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]: ...
    def embed(self, rows: Sequence[Sequence[int]]) -> ArrayLike: ...
    def update_weights(self, path: str, version: str) -> None: ...
    def load_adapter(self, name: str, path: str) -> None: ...
    def unload_adapter(self, name: str) -> None: ...
    def stats(self) -> Any:
        """A dataclass of plain numbers and strings."""


Load = Callable[[messages.Start], Hosted]


def run(arguments: Sequence[str], load: Load) -> None:
    """Serve the client at the other end of the socket `arguments[0]` (a file descriptor) until it is gone.

    `arguments[1]` is the id of the process that started this one. Never returns.
    """
    descriptor, parent = int(arguments[0]), int(arguments[1])
    link: Link[ToEngine] = Link(socket.socket(fileno=descriptor), ToEngine)
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(link, inbox), name="reader", daemon=True).start()
    threading.Thread(target=_watch, args=(parent,), name="watch", daemon=True).start()
    try:
        _serve(link, inbox, load)
        status = 2
    except Exception as error:
        log.exception("the engine failed")
        link.send(messages.Failed(0, f"{type(error).__name__}: {error}", is_fatal=True))
        status = 1
    link.flush(_FLUSH_SECONDS)
    os._exit(status)


def _read(link: Link[ToEngine], inbox: queue.SimpleQueue[ToEngine]) -> None:
    while True:
        try:
            inbox.put(link.receive())
        except Malformed as error:
            link.send(messages.Refused(error.call, str(error)))
        except EOFError:
            os._exit(0)  # nobody is left to work for, whatever the main thread is doing


def _watch(parent: int) -> None:
    """A process forked from the client would hold the socket open after the client's death."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(0)


def _serve(link: Link[ToEngine], inbox: queue.SimpleQueue[ToEngine], load: Load) -> None:
    """Returns if the engine could not be loaded, for a reason that the client is told."""
    start = inbox.get()
    while not isinstance(start, messages.Start):
        link.send(messages.Refused(start.call, "the engine has not been started"))
        start = inbox.get()
    try:
        engine = load(start)
    except UserError as error:
        link.send(messages.Refused(start.call, str(error)))
        return
    link.send(messages.Ready(start.call, engine.vocab_size, engine.max_positions))
    while True:
        while not inbox.empty() or not engine.has_work:
            message = inbox.get()
            answer = _answer(engine, message)
            if answer is not None:
                link.send(answer)
            if isinstance(message, messages.Score | messages.Embed) and engine.has_work:
                break  # a pile of them must not keep those who wait for a token
        events = engine.step()
        if events:
            link.send(messages.Events(events))


def _answer(engine: Hosted, message: ToEngine) -> Struct | None:
    try:
        return _do(engine, message)
    except UserError as error:
        return messages.Refused(message.call, str(error))
    except Exception as error:
        log.exception("the engine could not answer")
        return messages.Failed(message.call, f"{type(error).__name__}: {error}")


def _do(engine: Hosted, message: ToEngine) -> Struct | None:
    call = message.call
    match message:
        case messages.Submit(request=request):
            if request.id != str(call):
                raise UserError(f"the request of call {call} is named '{request.id}'")
            engine.submit(request)
            return None  # its events are the answer
        case messages.Cancel(target=target):
            engine.cancel(str(target))
            return None
        case messages.Score(rows=rows):
            return messages.Scores(call, engine.score(rows))
        case messages.Embed(rows=rows):
            vectors = np.asarray(engine.embed(rows), dtype="<f4")
            return messages.Vectors(call, vectors.shape[1], vectors.tobytes())
        case messages.UpdateWeights(path=path, version=version):
            engine.update_weights(path, version)
        case messages.LoadAdapter(name=name, path=path):
            engine.load_adapter(name, path)
        case messages.UnloadAdapter(name=name):
            engine.unload_adapter(name)
        case messages.Stats():
            return messages.Figures(call, asdict(engine.stats()))
        case messages.Start():
            raise UserError("the engine has been started already")
    return messages.Done(call)
