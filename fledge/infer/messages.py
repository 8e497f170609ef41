"""What the engine's process and its client say to each other, and how it goes over the wire.

A message is a MessagePack map whose `type` names one of the structs below, behind its length in four bytes (big
endian). Reading checks every field against its type and builds nothing else: no code, no classes of the sender's
choosing. Both ends use `Link`; process.py is the client, worker.py the engine's side.
"""

from __future__ import annotations

import queue
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct

from fledge.types import Request, TokenEvent

# Far more than any message that we send (a million token ids are 5 MB); what is longer is passed over unread.
MAX_MESSAGE_BYTES = 1 << 26
_HEADER = struct.Struct(">I")
_CHUNK_BYTES = 1 << 20

# To the engine. `call` is the client's number for the question; the answer bears it too.


class Weights(Struct, frozen=True):
    """A file of weights that the engine before took; `mark` tells whether it is still what it was (worker.py)."""

    path: str
    version: str
    mark: str


class Start(Struct, tag=True, frozen=True):
    """The first message, and only the first. `config` is an `EngineConfig` as JSON values, `draft` the checkpoint of
    the model that guesses ahead. `weights`, in this order, and `adapters`, paths by name, are what the engine before
    had been given."""

    checkpoint: str
    config: dict[str, Any] = {}
    device: str = "cpu"
    num_threads: int | None = None
    call: int = 0
    draft: str | None = None
    weights: list[Weights] = []
    adapters: dict[str, str] = {}


class Submit(Struct, tag=True, frozen=True):
    """`request.id` must be the call's number: it names the request in the events."""

    call: int
    request: Request


class Cancel(Struct, tag=True, frozen=True):
    """End the request that was submitted under the number `target`; without effect if it has ended. No answer."""

    call: int
    target: int


class Score(Struct, tag=True, frozen=True):
    call: int
    rows: list[list[int]]


class Embed(Struct, tag=True, frozen=True):
    call: int
    rows: list[list[int]]


class UpdateWeights(Struct, tag=True, frozen=True):
    call: int
    path: str
    version: str


class LoadAdapter(Struct, tag=True, frozen=True):
    call: int
    name: str
    path: str


class UnloadAdapter(Struct, tag=True, frozen=True):
    call: int
    name: str


class Stats(Struct, tag=True, frozen=True):
    call: int


ToEngine = Start | Submit | Cancel | Score | Embed | UpdateWeights | LoadAdapter | UnloadAdapter | Stats

# To the client.


class Ready(Struct, tag=True, frozen=True):
    """The model is loaded. `max_positions` None: no limit but the cache. `lost` are the adapters that could not be
    loaded again, by name, and why."""

    call: int
    vocab_size: int
    max_positions: int | None
    lost: dict[str, str] = {}


class Events(Struct, tag=True, frozen=True):
    """What one step brought, over all requests; `request_id` is the number of the call that submitted it."""

    events: list[TokenEvent]


class Done(Struct, tag=True, frozen=True):
    call: int


class Updated(Struct, tag=True, frozen=True):
    """The tensors `names` were taken from a file; see `Weights.mark`."""

    call: int
    names: list[str]
    mark: str


class Scores(Struct, tag=True, frozen=True):
    call: int
    rows: list[list[float]]


class Vectors(Struct, tag=True, frozen=True):
    """(N, `width`) little-endian float32."""

    call: int
    width: int
    data: bytes


class Figures(Struct, tag=True, frozen=True):
    call: int
    figures: dict[str, int | float | str]


class Refused(Struct, tag=True, frozen=True):
    """The question cannot be answered as asked (a `UserError`); nothing has changed. `call` 0: it could not be read."""

    call: int
    message: str


class Failed(Struct, tag=True, frozen=True):
    """Something went wrong that is not the caller's doing. With `is_fatal` the process ends after this message."""

    call: int
    message: str
    is_fatal: bool = False


ToClient = Ready | Events | Done | Updated | Scores | Vectors | Figures | Refused | Failed

MessageT = TypeVar("MessageT")


class Malformed(Exception):
    """A message that could not be read; the next one can. `call` is its number if that much was legible, else 0."""

    def __init__(self, call: int, complaint: str) -> None:
        super().__init__(complaint)
        self.call = call


class Link(Generic[MessageT]):
    """One end of the connection, receiving `MessageT`. `send` may be called from any thread and never waits."""

    def __init__(self, end: socket.socket, receives: Any) -> None:
        self._socket = end
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._encoder = msgspec.msgpack.Encoder()
        self._lock = threading.Lock()  # an encoder serves one thread at a time
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="engine link", daemon=True)
        self._writer.start()

    def send(self, message: Struct) -> None:
        """Queue a message; a thread of its own writes it, however slowly the other side reads.

        Raises `OverflowError` for a number that is not of 64 bits, ValueError for a message that is too long.
        """
        with self._lock:
            data = self._encoder.encode(message)
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(data)} bytes, the longest is {MAX_MESSAGE_BYTES}")
        self._outbox.put(_HEADER.pack(len(data)) + data)

    def receive(self) -> MessageT:
        """Wait for the next message. `Malformed` if it cannot be read, `EOFError` if the other side is gone."""
        (size,) = _HEADER.unpack(self._read(_HEADER.size))
        if size > MAX_MESSAGE_BYTES:
            self._pass_over(size)
            raise Malformed(0, f"a message of {size} bytes, the longest is {MAX_MESSAGE_BYTES}")
        data = self._read(size)
        try:
            message: MessageT = self._decoder.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise Malformed(_call_of(data), f"not a message: {error}") from error
        return message

    def flush(self, timeout_seconds: float) -> None:
        """Send nothing more, and wait until all that was queued is written, but no longer than so."""
        self._outbox.put(None)
        self._writer.join(timeout_seconds)

    def close(self) -> None:
        """Hang up; a `receive` that waits raises `EOFError`."""
        self._outbox.put(None)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _write(self) -> None:
        while (data := self._outbox.get()) is not None:
            try:
                self._socket.sendall(data)
            except OSError:
                return  # whoever receives learns of it

    def _read(self, size: int) -> bytes:
        return b"".join(self._chunks(size))

    def _pass_over(self, size: int) -> None:
        for _ in self._chunks(size):
            pass

    def _chunks(self, size: int) -> Iterator[bytes]:
        while size:
            try:
                chunk = self._socket.recv(min(size, _CHUNK_BYTES))
            except OSError as error:
                raise EOFError(str(error)) from error
            if not chunk:
                raise EOFError("the connection is closed")
            size -= len(chunk)
            yield chunk


def _call_of(data: bytes) -> int:
    try:
        message = msgspec.msgpack.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return 0
    call = message.get("call") if isinstance(message, dict) else None
    return call if isinstance(call, int) else 0
