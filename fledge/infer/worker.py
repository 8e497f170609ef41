"""The engine's side of the process boundary: read messages, run steps, send what comes of them. No torch in here.

Started by process.py as `python -m fledge.infer` (see __main__.py), which hands it `hosted.load`. One thread reads, one
writes (messages.Link), and the main thread alone touches the engine: whatever has come in is dealt with between two
steps, so that a cancellation takes effect within one. A grammar that is new takes up to a second to try out and
compile; one more thread does that, and the request is submitted when it has. Nothing that a client sends ends the
process; the client's end does, at once.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import ArrayLike

from fledge.errors import UserError
from fledge.infer import messages
from fledge.infer.messages import Link, Malformed, ToEngine
from fledge.types import Grammar, Request, TokenEvent

log = logging.getLogger(__name__)

# What could not be written within this time when the process ends is lost: the client has stopped reading.
_FLUSH_SECONDS = 5.0
# Positions that are scored or embedded between two steps, so that those who wait for a token wait no longer than that.
_READ_POSITIONS = 4096
# Of a complaint: a name that was wrong may be as long as the longest message.
_COMPLAINT_CHARS = 2000
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
    def is_prepared(self, grammar: Grammar) -> bool:
        """Whether a request with this grammar is submitted without delay."""

    def prepare(self, grammar: Grammar) -> None:
        """Make it so, however long that takes. Called by another thread than everything else."""

    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> bool: ...
    def step(self) -> list[TokenEvent]: ...
    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]: ...
    def embed(self, rows: Sequence[Sequence[int]]) -> ArrayLike: ...
    def update_weights(self, path: str, version: str) -> Sequence[str]:
        """The names of the tensors that were taken."""

    def load_adapter(self, name: str, path: str) -> None: ...
    def unload_adapter(self, name: str) -> None: ...
    def stats(self) -> Any:
        """A dataclass of plain numbers and strings."""


Load = Callable[[messages.Start], Hosted]


@dataclass(frozen=True)
class _Prepared:
    """The grammar of a request is compiled, or cannot be."""

    call: int
    request: Request
    error: Exception | None


class _Reading:
    """Rows to be scored or embedded, the longest first, as far as that has come. `order` are the rows not read yet."""

    def __init__(self, message: messages.Score | messages.Embed) -> None:
        self.call, self._message = message.call, message
        self.order = sorted(range(len(message.rows)), key=lambda place: -len(message.rows[place]))
        self._found: dict[int, Any] = {}

    def read(self, engine: Hosted) -> None:
        rows = self._message.rows
        sizes = accumulate(len(rows[place]) for place in self.order)
        num_next = max(1, sum(size <= _READ_POSITIONS for size in sizes))
        places, self.order = self.order[:num_next], self.order[num_next:]
        some = [rows[place] for place in places]
        is_score = isinstance(self._message, messages.Score)
        found = engine.score(some) if is_score else np.asarray(engine.embed(some), dtype="<f4")
        self._found.update(zip(places, found, strict=True))

    def answer(self) -> Struct:
        in_order = [self._found[place] for place in range(len(self._message.rows))]
        if isinstance(self._message, messages.Score):
            return messages.Scores(self.call, in_order)
        width = len(in_order[0]) if in_order else 0
        return messages.Vectors(self.call, width, b"".join(vector.tobytes() for vector in in_order))


Inbox = queue.SimpleQueue[ToEngine | _Prepared]


@dataclass
class _Desk:
    """Where messages are dealt with. The requests of `preparing` wait for their grammars, in the hands of a thread;
    `readings` are the texts to be scored or embedded, of which a portion is read between two steps."""

    engine: Hosted
    inbox: Inbox
    preparing: dict[int, Request] = field(default_factory=dict)
    readings: deque[_Reading] = field(default_factory=deque)
    _grammars: queue.SimpleQueue[tuple[int, Request, Grammar]] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._prepare, name="grammars", daemon=True).start()

    def answer(self, message: ToEngine | _Prepared) -> Struct | None:
        try:
            return self._do(message)
        except Exception as error:
            return _complaint(message.call, error)

    def _do(self, message: ToEngine | _Prepared) -> Struct | None:
        match message:
            case messages.Submit(call=call, request=request):
                self._submit(call, request)
                return None  # its events are the answer
            case _Prepared():
                self._go_on(message)
                return None
            case messages.Cancel(target=target):
                return self._cancel(target)
            case messages.Score() | messages.Embed():
                self.readings.append(_Reading(message))
                return None
            case _:
                return _do(self.engine, message)

    def read(self) -> Struct | None:
        """Read the next portion of what is to be scored or embedded; the answer if that was the last."""
        reading = self.readings.popleft()
        try:
            reading.read(self.engine)
        except Exception as error:
            return _complaint(reading.call, error)
        if reading.order:
            self.readings.append(reading)  # the next one's turn
            return None
        return reading.answer()

    def _submit(self, call: int, request: Request) -> None:
        if request.id != str(call):
            raise UserError(f"the request of call {call} is named '{request.id}'")
        if call in self.preparing:
            raise UserError(f"there is a request of call {call} already")
        if request.grammar is None or self.engine.is_prepared(request.grammar):
            self.engine.submit(request)
        else:
            self.preparing[call] = request
            self._grammars.put((call, request, request.grammar))

    def _go_on(self, prepared: _Prepared) -> None:
        if self.preparing.get(prepared.call) is not prepared.request:
            return  # cancelled meanwhile
        del self.preparing[prepared.call]
        if prepared.error is not None:
            raise prepared.error
        self.engine.submit(prepared.request)

    def _cancel(self, target: int) -> Struct | None:
        request = self.preparing.pop(target, None)
        if request is None:
            self.engine.cancel(str(target))
            return None
        ended = [TokenEvent(-1, 0.0, "", "cancelled", request.id, index) for index in range(request.n)]
        return messages.Events(ended)

    def _prepare(self) -> None:
        while True:
            call, request, grammar = self._grammars.get()
            error = None
            if call in self.preparing:  # nobody waits for what was cancelled
                try:
                    self.engine.prepare(grammar)
                except Exception as refusal:
                    error = refusal
            self.inbox.put(_Prepared(call, request, error))


def run(arguments: Sequence[str], load: Load) -> None:
    """Serve the client at the other end of the socket `arguments[0]` (a file descriptor) until it is gone.

    `arguments[1]` is the id of the process that started this one. Never returns.
    """
    descriptor, parent = int(arguments[0]), int(arguments[1])
    link: Link[ToEngine] = Link(socket.socket(fileno=descriptor), ToEngine)
    inbox: Inbox = queue.SimpleQueue()
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


def _read(link: Link[ToEngine], inbox: Inbox) -> None:
    while True:
        try:
            inbox.put(link.receive())
        except Malformed as error:
            link.send(messages.Refused(error.call, str(error)[:_COMPLAINT_CHARS]))
        except EOFError:
            os._exit(0)  # nobody is left to work for, whatever the main thread is doing


def _watch(parent: int) -> None:
    """A process forked from the client would hold the socket open after the client's death."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(0)


def _serve(link: Link[ToEngine], inbox: Inbox, load: Load) -> None:
    """Returns if the engine could not be loaded, for a reason that the client is told."""
    start = inbox.get()
    while not isinstance(start, messages.Start):
        link.send(messages.Refused(start.call, "the engine has not been started"))
        start = inbox.get()
    try:
        _require_unchanged(start.weights)
        engine = load(start)
        lost = _restore(engine, start)
    except UserError as error:
        link.send(messages.Refused(start.call, str(error)))
        return
    desk = _Desk(engine, inbox)
    link.send(messages.Ready(start.call, engine.vocab_size, engine.max_positions, lost))
    while True:
        while not inbox.empty() or not (engine.has_work or desk.readings):
            _tell(link, desk.answer(inbox.get()))
        if desk.readings:
            _tell(link, desk.read())
        if engine.has_work and (events := engine.step()):
            _tell_events(link, engine, events)


def _restore(engine: Hosted, start: messages.Start) -> dict[str, str]:
    """Give the engine what the one before had been given; the adapters that are not to be had, and why.

    Only the requests that name such an adapter miss it, and they are told. Without its weights, however, the engine
    would answer as another model: then `UserError`.
    """
    for weights in start.weights:
        engine.update_weights(weights.path, weights.version)
    lost: dict[str, str] = {}
    for name, path in start.adapters.items():
        try:
            engine.load_adapter(name, path)
        except UserError as error:
            lost[name] = str(error)
    return lost


def _require_unchanged(weights: Sequence[messages.Weights]) -> None:
    for file in weights:
        if _mark(file.path) != file.mark:
            raise UserError(
                f"{file.path}: changed or removed since its weights were taken (version '{file.version}'), so that "
                "they cannot be taken again; start the engine anew with a checkpoint that holds them"
            )


def _mark(path: str) -> str:
    """What differs if a file was written anew; of none that is there, nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"


def _complaint(call: int, error: Exception) -> Struct:
    """What became of a question, with no more of what was asked than a line needs."""
    if isinstance(error, UserError):
        return messages.Refused(call, str(error)[:_COMPLAINT_CHARS])
    log.error("the engine could not answer", exc_info=error)
    return messages.Failed(call, f"{type(error).__name__}: {error}"[:_COMPLAINT_CHARS])


def _tell(link: Link[ToEngine], answer: Any) -> None:
    """An answer too long for a message is refused: nothing that is asked ends the process."""
    if answer is None:
        return
    try:
        link.send(answer)
    except ValueError as error:
        link.send(messages.Refused(answer.call, f"the answer does not fit into {error}; ask for less at once"))


def _tell_events(link: Link[ToEngine], engine: Hosted, events: list[TokenEvent]) -> None:
    """What a step brought, in one message or, where that is too long, in one for each event."""
    try:
        link.send(messages.Events(events))
    except ValueError as error:
        if len(events) > 1:
            for event in events:
                _tell_events(link, engine, [event])
            return
        engine.cancel(events[0].request_id)
        _tell(
            link,
            messages.Refused(
                int(events[0].request_id), f"a token comes with {error}; ask for fewer of its log-probabilities"
            ),
        )


def _do(engine: Hosted, message: ToEngine) -> Struct | None:
    """What needs no more than the engine."""
    call = message.call
    match message:
        case messages.UpdateWeights(path=path, version=version):
            mark = _mark(path)  # before it is read: what is written over it meanwhile must show
            return messages.Updated(call, list(engine.update_weights(path, version)), mark)
        case messages.LoadAdapter(name=name, path=path):
            engine.load_adapter(name, path)
        case messages.UnloadAdapter(name=name):
            engine.unload_adapter(name)
        case messages.Stats():
            return messages.Figures(call, asdict(engine.stats()))
        case messages.Start():
            raise UserError("the engine has been started already")
    return messages.Done(call)
