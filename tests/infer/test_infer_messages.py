"""The wire: what is said is what arrives, and nonsense is refused without harm, under hypothesis too."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.infer import messages
from fledge.infer.messages import MAX_MESSAGE_BYTES, Link, Malformed, ToClient, ToEngine
from fledge.infer.worker import _complaint, _tell, _tell_events
from fledge.types import Grammar, Request, SamplingParams, TokenEvent, TokenLogprobs

FAKE = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))
PARAMS = SamplingParams(
    max_tokens=3, temperature=0.5, top_k=4, logit_bias=((3, -1.5), (4, float("-inf"))), allowed_ids=(1, 2)
)
FULL_REQUEST = Request(
    id="1",
    prompt_ids=(1, 2, 3),
    params=PARAMS,
    stop_ids=frozenset({7, 8}),
    stop=("\n", "园"),
    tenant="t",
    adapter="a",
    n=2,
    best_of=3,
    top_logprobs=2,
    prompt_logprobs=1,
    grammar=Grammar("regex", "[a-z]+"),
)
FULL_EVENT = TokenEvent(
    5, -0.25, "é", "stop", "1", 1, TokenLogprobs(-0.5, 2, ((5, -0.5), (6, -1.0))), (TokenLogprobs(-2.0, 9),), 16
)
TO_ENGINE = [
    messages.Start("path", {"num_blocks": 3}, "cpu", 2, 1),
    messages.Submit(1, FULL_REQUEST),
    messages.Cancel(2, 1),
    messages.Score(3, [[1, 2], []]),
    messages.Embed(4, [[1]]),
    messages.UpdateWeights(5, "file", "v2"),
    messages.LoadAdapter(6, "name", "path"),
    messages.UnloadAdapter(7, "name"),
    messages.Stats(8),
]
TO_CLIENT = [
    messages.Ready(1, 100, None),
    messages.Events([FULL_EVENT, TokenEvent(-1, 0.0, "", "error", "2")]),
    messages.Done(1),
    messages.Scores(3, [[-0.5], []]),
    messages.Vectors(4, 2, b"\0" * 8),
    messages.Figures(5, {"a": 1, "b": 0.5, "c": "x"}),
    messages.Refused(6, "no"),
    messages.Failed(7, "oh", True),
]


def frame(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


@pytest.mark.parametrize("message", TO_ENGINE + TO_CLIENT, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: msgspec.Struct) -> None:
    ours, theirs = socket.socketpair()
    sender: Link[ToEngine] = Link(ours, ToEngine)
    receiver: Link[ToEngine | ToClient] = Link(theirs, ToEngine | ToClient)
    sender.send(message)
    assert receiver.receive() == message
    sender.close()
    with pytest.raises(EOFError):
        receiver.receive()
    receiver.close()


def test_sending_never_waits_for_the_reader() -> None:
    ours, theirs = socket.socketpair()
    sender: Link[ToClient] = Link(ours, ToClient)
    began = time.monotonic()
    for call in range(200):
        sender.send(messages.Vectors(call, 1, b"x" * 100_000))  # 20 MB, far more than a socket holds
    assert time.monotonic() - began < 5
    receiver: Link[ToClient] = Link(theirs, ToClient)
    assert [receiver.receive().call for _ in range(200)] == list(range(200))  # type: ignore[union-attr]
    sender.flush(1.0)
    sender.close()
    receiver.close()


def test_what_is_too_long_is_neither_sent_nor_read_and_the_next_message_is() -> None:
    ours, theirs = socket.socketpair()
    sender: Link[ToClient] = Link(ours, ToClient)
    with pytest.raises(ValueError, match="the longest is"):
        sender.send(messages.Vectors(1, 1, b"x" * (MAX_MESSAGE_BYTES + 1)))
    sender.close()
    theirs.close()
    ours, theirs = socket.socketpair()
    receiver: Link[ToClient] = Link(theirs, ToClient)
    sender = Link(ours, ToClient)
    size = MAX_MESSAGE_BYTES + 5
    sender._outbox.put(struct.pack(">I", size) + bytes(size))
    sender.send(messages.Done(3))
    with pytest.raises(Malformed, match=f"a message of {size} bytes"):
        receiver.receive()
    assert receiver.receive() == messages.Done(3)
    sender.close()
    receiver.close()


class Worker:
    """The engine's process with nothing but a socket at our end."""

    def __init__(self, **config: object) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(10)
        with theirs:
            self.process = subprocess.Popen([*FAKE, str(theirs.fileno()), str(os.getpid())], pass_fds=[theirs.fileno()])
        self.say(messages.Start("", config, call=1))
        assert isinstance(self.hear(), messages.Ready)

    def say(self, message: msgspec.Struct) -> None:
        self.socket.sendall(frame(msgspec.msgpack.encode(message)))

    def hear(self) -> ToClient:
        (size,) = struct.unpack(">I", self.socket.recv(4, socket.MSG_WAITALL))
        message: ToClient = msgspec.msgpack.decode(self.socket.recv(size, socket.MSG_WAITALL), type=ToClient)
        return message

    def is_well(self) -> bool:
        self.say(messages.Stats(77))
        while True:
            answer = self.hear()
            if isinstance(answer, messages.Figures) and answer.call == 77:
                return self.process.poll() is None

    def close(self) -> None:
        self.socket.close()
        self.process.wait(10)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def request_with(**changes: object) -> bytes:
    message = msgspec.to_builtins(messages.Submit(9, Request("9", (1,), SamplingParams())))
    for path, value in changes.items():
        *outer, name = path.split("__")
        target = message
        for key in outer:
            target = target[key]
        target[name] = value
    return msgspec.msgpack.encode(message)


@pytest.mark.parametrize(
    ("data", "call", "complaint"),
    [
        (b"", 0, "not a message"),
        (b"\xc1\xc1\xc1", 0, "not a message"),
        (msgspec.msgpack.encode([1, 2]), 0, "Expected `object`, got `array`"),
        (msgspec.msgpack.encode({"type": "Explode", "call": 4}), 4, "Invalid value 'Explode'"),
        (msgspec.msgpack.encode({"call": 4}), 4, "missing required field `type`"),
        (msgspec.msgpack.encode({"type": "Score", "call": 5, "rows": [["x"]]}), 5, "Expected `int`, got `str`"),
        (request_with(request__params__temperature=-1.0), 9, "temperature must be 0 or more"),
        (request_with(request__params__top_p=float("nan")), 9, "top_p must be"),
        (request_with(request__prompt_ids="abc"), 9, "Expected `array`, got `str`"),
        (request_with(request__n=0), 9, "n must be from 1"),
        (request_with(request__n=10**9, request__best_of=None), 9, "at most 4096 answers"),
        (request_with(request__grammar={"kind": "python", "text": ""}), 9, "Invalid enum value 'python'"),
        (request_with(request__id="another"), 9, "named 'another'"),
        (msgspec.msgpack.encode(messages.Start("again", call=6)), 6, "started already"),
        (b"\x91" * 100_000 + b"\x01", 0, "not a message"),
    ],
)
def test_a_malformed_message_is_refused_with_its_reason(worker: Worker, data: bytes, call: int, complaint: str) -> None:
    worker.socket.sendall(frame(data))
    answer = worker.hear()
    assert isinstance(answer, messages.Refused)
    assert answer.call == call
    assert complaint in answer.message
    assert worker.is_well()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(TO_ENGINE) - 1), st.integers(0, 10_000), st.booleans())
def test_nothing_on_the_wire_ends_the_process(
    worker: Worker, noise: bytes, which: int, place: int, is_grafted: bool
) -> None:
    data = noise
    if is_grafted:  # a true message with some bytes of it overwritten
        whole = msgspec.msgpack.encode(TO_ENGINE[which])
        place %= len(whole)
        data = whole[:place] + noise[:3] + whole[place + 3 :]
    worker.socket.sendall(frame(data))
    assert worker.is_well()


def test_answers_too_long_for_a_message_are_refused_and_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", 500)
    ours, theirs = socket.socketpair()
    link: Link[ToEngine] = Link(ours, ToEngine)
    client: Link[ToClient] = Link(theirs, ToClient)
    _tell(link, messages.Vectors(3, 150, bytes(600)))
    short = [replace(FULL_EVENT, request_id=str(call)) for call in (8, 9)]
    long = replace(FULL_EVENT, request_id="7", model=TokenLogprobs(0.0, 1, tuple((i, 0.5) for i in range(100))))
    cancelled: list[str] = []
    engine: Any = SimpleNamespace(cancel=cancelled.append)
    _tell_events(link, engine, [short[0], long, short[1]])
    told: list[Any] = [client.receive() for _ in range(4)]
    assert (told[0].call, told[2].call, cancelled) == (3, 7, ["7"])
    assert "ask for less at once" in told[0].message
    assert "ask for fewer" in told[2].message
    assert [*told[1].events, *told[3].events] == short
    link.close()
    client.close()


def test_a_complaint_is_no_longer_than_a_line_needs() -> None:
    name = "x" * 1_000_000
    for error in (UserError(f"no adapter '{name}'"), ValueError(name)):
        complaint: Any = _complaint(4, error)
        assert (complaint.call, len(complaint.message)) == (4, 2000)


def test_a_client_that_does_not_read_does_not_stop_the_engine(tmp_path: Path) -> None:
    finished = tmp_path / "finished"
    worker = Worker(step_seconds=0, finished_path=str(finished))
    num_due = 64 * 300  # some 3 MB of events, far more than a socket holds
    worker.say(messages.Submit(5, Request("5", (1,), SamplingParams(max_tokens=300), n=64)))
    deadline = time.monotonic() + 20
    while not finished.exists():
        assert time.monotonic() < deadline, "the engine waits for its reader"
        time.sleep(0.01)
    num_events = 0
    while num_events < num_due:
        message = worker.hear()
        assert isinstance(message, messages.Events)
        num_events += len(message.events)
    worker.close()
