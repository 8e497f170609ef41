"""The engine's process and its client under faults: deaths on either side, slow readers, nonsense on the wire."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_engine import NOT_A_NUMBER, STEP_FAILS, SUBMIT_FAILS

from fledge.errors import EngineDied, EngineError, UserError
from fledge.infer.process import EngineProcess
from fledge.types import Grammar, Request, SamplingParams, TokenEvent

FAKE = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))
ENDLESS = 10_000_000


def start(checkpoint: str = "", **config: object) -> EngineProcess:
    return EngineProcess(checkpoint, config, command=FAKE)


@pytest.fixture(scope="module")
def shared() -> Iterator[EngineProcess]:
    """For tests after which the process is as it was."""
    with start() as engine:
        yield engine


@pytest.fixture
def engine() -> Iterator[EngineProcess]:
    with start() as engine:
        yield engine


def ask(name: str, first: int = 5, max_tokens: int = 4, n: int = 1) -> Request:
    return Request(name, (first, 1), SamplingParams(max_tokens=max_tokens), n=n)


def ids(events: Iterator[TokenEvent], index: int = 0) -> list[int]:
    return [event.id for event in events if event.index == index]


def wait_until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it has not come about"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_events_come_in_order_under_the_callers_own_id(shared: EngineProcess) -> None:
    events = list(shared.submit(ask("mine", n=2)))
    assert {event.request_id for event in events} == {"mine"}
    assert ids(iter(events)) == ids(iter(events), index=1) == [5, 6, 7, 8]
    assert [event.finish_reason for event in events if event.index == 0] == [None, None, None, "length"]
    assert events[0] == TokenEvent(5, -0.5, "5 ", None, "mine", 0)


def test_the_same_through_asyncio_many_at_once(shared: EngineProcess) -> None:
    async def one(first: int) -> list[int]:
        return [event.id async for event in shared.submit_async(ask(f"async {first}", first))]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(one(first) for first in range(50)))

    assert asyncio.run(all_of_them()) == [[first + n for n in range(4)] for first in range(50)]


def test_every_question_has_its_answer(shared: EngineProcess, tmp_path: Path) -> None:
    assert (shared.vocab_size, shared.max_positions, shared.is_ready) == (1000, 64, True)
    assert shared.score([[1, 2, 3], [4]]) == [[-2.0, -3.0], []]
    assert np.array_equal(shared.embed([[7, 7], [8]]), np.array([[2, 7, 0.5], [1, 8, 0.5]], dtype=np.float32))
    (tmp_path / "weights").touch()
    shared.update_weights(tmp_path / "weights", "seven")
    shared.load_adapter("polite", tmp_path)
    assert shared.stats()["adapters"] == "polite"
    shared.unload_adapter("polite")
    stats = shared.stats()
    assert (stats["weights_version"], stats["adapters"], stats["num_live"]) == ("seven", "", 0)


def test_many_texts_are_read_in_portions_between_the_steps_of_others(engine: EngineProcess) -> None:
    with engine.submit(ask("endless", max_tokens=ENDLESS)) as stream:
        next(stream)
        rows = [[place] * size for place, size in enumerate((9, 3000, 5000, 3000, 1, 2000, 2000), start=1)]
        vectors = engine.embed(rows)
        assert vectors[:, 0].tolist() == [len(row) for row in rows]
        assert vectors[:, 1].tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert engine.stats()["num_pauses"] == 4  # 5000 alone, 3000, 3000, 2000 + 2000 + 9 + 1
        with pytest.raises(UserError, match="no such id"):
            engine.embed([[5] * 5000, [5000]])
        assert engine.score([[5, 6]]) == [[-6.0]]
    assert engine.embed([]).size == 0


def test_what_is_refused_is_a_user_error_and_harms_nobody(shared: EngineProcess, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="id 5000 is outside the vocabulary of 1000"):
        list(shared.submit(ask("bad", 5000)))
    with pytest.raises(UserError, match="missing"):
        shared.update_weights(tmp_path / "nothing", "1")
    with pytest.raises(UserError, match="no adapter 'x' is loaded"):
        shared.unload_adapter("x")
    with pytest.raises(UserError, match="cannot be sent"):
        shared.submit(Request("big", (2**70,), SamplingParams()))
    with pytest.raises(UserError, match="cannot be sent"):
        shared.score([[2**70]])
    with pytest.raises(EngineError, match="RuntimeError: out of luck"):
        list(shared.submit(ask("unlucky", SUBMIT_FAILS)))
    stream = shared.submit(ask("twice", max_tokens=1000))
    with pytest.raises(UserError, match="a request 'twice' already"):
        shared.submit(ask("twice"))
    stream.close()
    assert ids(shared.submit(ask("good"))) == [5, 6, 7, 8]


def test_a_prediction_that_is_no_number_ends_the_answer_and_says_so(shared: EngineProcess) -> None:
    [event] = shared.submit(ask("nan", NOT_A_NUMBER))
    assert (event.id, event.finish_reason) == (-1, "error")


def test_a_cancelled_request_ends_at_once_and_says_so(shared: EngineProcess) -> None:
    stream = shared.submit(ask("long", max_tokens=ENDLESS, n=2))
    assert next(stream).id == 5
    assert shared.cancel("long")
    assert [event.finish_reason for event in stream][-2:] == ["cancelled", "cancelled"]
    assert not shared.cancel("long")
    assert shared.stats()["num_live"] == 0


@pytest.mark.parametrize("how", ["close", "with", "drop", "async"])
def test_a_reader_who_leaves_cancels(shared: EngineProcess, how: str) -> None:
    async def read_one() -> None:
        async with shared.submit_async(ask(how, max_tokens=ENDLESS)) as stream:
            await anext(stream)

    if how == "async":
        asyncio.run(read_one())
    else:
        stream = shared.submit(ask(how, max_tokens=ENDLESS))
        next(stream)
        if how == "close":
            stream.close()
            assert list(stream) == []
        elif how == "with":
            with stream:
                next(stream)
        del stream
        gc.collect()
    wait_until(lambda: shared.stats()["num_live"] == 0)


def test_a_grammar_that_takes_long_keeps_nobody_waiting_but_who_sent_it(shared: EngineProcess, tmp_path: Path) -> None:
    slow = Grammar("regex", str(tmp_path / "compiled"))
    waiting = [shared.submit(replace(ask(name), grammar=slow)) for name in ("first", "second", "given up")]
    for name in ("free", "known"):
        grammar = Grammar("regex", "known") if name == "known" else None
        assert ids(shared.submit(replace(ask(name), grammar=grammar))) == [5, 6, 7, 8]
    assert shared.cancel("given up")
    [last] = waiting.pop()
    assert (last.id, last.finish_reason, last.request_id) == (-1, "cancelled", "given up")
    assert all(stream._items.empty() for stream in waiting)
    (tmp_path / "compiled").touch()
    assert [ids(stream) for stream in waiting] == [[5, 6, 7, 8]] * 2
    assert shared.stats()["num_live"] == 0


def test_a_grammar_that_cannot_be_used_is_refused_and_the_next_is_not(shared: EngineProcess) -> None:
    bad = [shared.submit(replace(ask(kind), grammar=Grammar(kind))) for kind in ("lark", "json_object", "json_schema")]
    with pytest.raises(UserError, match="too complex"):
        next(bad[0])
    with pytest.raises(EngineError, match="RuntimeError: out of memory"):
        next(bad[1])
    assert ids(bad[2]) == [5, 6, 7, 8]


def test_a_slow_reader_keeps_nobody_waiting_and_misses_nothing(shared: EngineProcess) -> None:
    slow = shared.submit(ask("slow", first=0, max_tokens=500))
    assert ids(shared.submit(ask("quick", max_tokens=3))) == [5, 6, 7]
    wait_until(lambda: shared.stats()["num_live"] == 0)
    assert ids(slow) == list(range(500))


def test_kill_9_under_load_is_seen_within_a_second_by_everybody_and_the_next_is_served(
    engine: EngineProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "weights").touch()
    engine.update_weights(tmp_path / "weights", "trained")
    engine.load_adapter("polite", tmp_path)
    time.sleep(1.1)  # one that dies young would wait for the next request before it comes again
    seen: list[tuple[float, str]] = []

    def read(number: int) -> None:
        with pytest.raises(EngineDied) as caught:
            for _ in engine.submit(ask(str(number), max_tokens=ENDLESS)):
                pass
        seen.append((time.monotonic(), str(caught.value)))

    readers = [threading.Thread(target=read, args=(number,)) for number in range(16)]
    for reader in readers:
        reader.start()
    wait_until(lambda: engine.stats()["num_live"] == 16)
    first_pid = engine.pid
    assert first_pid is not None
    os.kill(first_pid, signal.SIGKILL)
    killed = time.monotonic()
    for reader in readers:
        reader.join(10)
    assert len(seen) == 16
    assert max(moment for moment, _ in seen) - killed < 1.0
    assert all("killed by signal 9" in text and "send the request again" in text for _, text in seen)
    wait_until(lambda: engine.is_ready and engine.pid != first_pid)  # by itself, before anybody asks
    assert ids(engine.submit(ask("after"))) == [5, 6, 7, 8]
    stats = engine.stats()
    assert (stats["weights_version"], stats["adapters"]) == ("trained", "polite")
    assert "killed by signal 9" in caplog.text


def kill_and_await_the_next(engine: EngineProcess) -> None:
    first_pid = engine.pid
    assert first_pid is not None
    os.kill(first_pid, signal.SIGKILL)
    wait_until(lambda: engine.pid != first_pid)


def test_the_next_process_has_all_that_the_last_was_given(engine: EngineProcess, tmp_path: Path) -> None:
    for version, names in enumerate(("a b c", "b", "c d", "d"), start=1):
        (tmp_path / str(version)).write_text(names)
        engine.update_weights(tmp_path / str(version), str(version))
    for name in ("polite", "rude", "gone"):
        engine.load_adapter(name, tmp_path)
    engine.unload_adapter("gone")
    before = engine.stats()
    (tmp_path / "3").unlink()  # the next file held c again, but
    (tmp_path / "5").write_text("c")
    engine.update_weights(tmp_path / "5", "5")  # now nothing of the third is needed any more
    for _ in range(2):
        kill_and_await_the_next(engine)
        stats = engine.stats()
        assert (stats["tensors"], stats["weights_version"]) == ("a=1 b=2 c=5 d=4", "5")
        assert stats["adapters"] == before["adapters"] == "polite rude"


@pytest.mark.parametrize("harm", ["removed", "written over", "replaced"])
def test_without_the_weights_it_had_the_engine_does_not_come_again(
    engine: EngineProcess, tmp_path: Path, harm: str
) -> None:
    (tmp_path / "old").write_text("a b")
    (tmp_path / "new").write_text("b")
    engine.update_weights(tmp_path / "old", "one")
    engine.update_weights(tmp_path / "new", "two")
    if harm == "removed":
        (tmp_path / "old").unlink()
    elif harm == "written over":
        (tmp_path / "old").write_text("a c")
    else:
        (tmp_path / "other").write_text("a b")
        (tmp_path / "other").replace(tmp_path / "old")
    kill_and_await_the_next(engine)
    with pytest.raises(EngineError, match=r"could not be started: .*old: changed or removed since .*version 'one'"):
        list(engine.submit(ask("r")))


def test_an_adapter_that_is_gone_is_missed_by_those_who_name_it_only(
    engine: EngineProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "gone").mkdir()
    engine.load_adapter("gone", tmp_path / "gone")
    engine.load_adapter("there", tmp_path)
    (tmp_path / "gone").rmdir()
    kill_and_await_the_next(engine)
    assert engine.stats()["adapters"] == "there"
    assert "the restarted engine lacks the adapter 'gone'" in caplog.text


def test_one_that_dies_young_is_not_raised_over_and_over(engine: EngineProcess) -> None:
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    wait_until(lambda: engine.pid is None)
    time.sleep(0.1)
    assert engine.pid is None
    assert ids(engine.submit(ask("next"))) == [5, 6, 7, 8]


def test_a_failing_step_ends_the_process_with_its_reason_and_it_comes_again(engine: EngineProcess) -> None:
    other = engine.submit(ask("other", max_tokens=ENDLESS))
    next(other)
    with pytest.raises(EngineDied, match="RuntimeError: the accelerator is on fire"):
        list(engine.submit(ask("bad", STEP_FAILS)))
    with pytest.raises(EngineDied, match="the accelerator is on fire"):
        list(other)
    assert ids(engine.submit(ask("after"))) == [5, 6, 7, 8]


def test_requests_that_come_while_it_starts_again_are_served_when_it_is_ready() -> None:
    with start("slow") as engine:
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        wait_until(lambda: not engine.is_ready)
        began = time.monotonic()
        assert ids(engine.submit(ask("patient"))) == [5, 6, 7, 8]
        assert time.monotonic() - began > 0.4


def test_what_cannot_be_loaded_is_said_at_the_start() -> None:
    with pytest.raises(UserError, match="missing: not a checkpoint"):
        start("missing")
    with pytest.raises(EngineError, match="could not be started: exit status 3"):
        start("crash")


def test_closing_ends_the_process_and_whoever_waits() -> None:
    engine = start()
    pid = engine.pid
    assert pid is not None
    stream = engine.submit(ask("cut", max_tokens=ENDLESS))
    next(stream)
    engine.close()
    engine.close()
    assert not is_alive(pid)
    with pytest.raises(EngineError, match="was closed"):
        list(stream)
    with pytest.raises(EngineError, match="is closed"):
        engine.submit(ask("late"))


CLIENT = """
import os, sys, time
from fledge.infer.process import EngineProcess
from fledge.types import Request, SamplingParams
engine = EngineProcess("", {}, command=sys.argv[1:3])
if sys.argv[3] == "forked" and os.fork() == 0:
    os.close(1)
    time.sleep(8)  # holds the client's end of the connection open
    os._exit(0)
stream = engine.submit(Request("r", (1,), SamplingParams(max_tokens=10**7)))
next(stream)
print(engine.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["plain", "forked"])
def test_a_client_that_is_killed_leaves_no_engine_behind(kind: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", CLIENT, *FAKE, kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        pid = int(client.stdout.readline())
        assert is_alive(pid)
        client.kill()
        wait_until(lambda: not is_alive(pid), seconds=5.0)


def test_a_client_starts_without_torch() -> None:
    program = "import sys, fledge.infer.process, fledge.infer.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
