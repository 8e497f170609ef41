"""`kill -9` under load, with real processes: of the engine, of the server. Who asked is told, nothing finished is lost.

That of the worker of fine-tuning jobs is in test_serve_tuning_real.py.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from real_server import RealServer, await_that

pytestmark = pytest.mark.slow
CHAT, RESPONSES = "/chat/completions", "/responses"
LONG = {"model": "tiny", "max_tokens": 120, "min_tokens": 120, "temperature": 0}
DIED = "engine_unavailable"
Seen = dict[str, Any]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[RealServer]:
    found = RealServer(tmp_path)
    yield found
    found.end()


def client_of(place: RealServer) -> httpx2.Client:
    return httpx2.Client(base_url=place.url, headers={"authorization": f"Bearer {place.key}"}, timeout=60)


def asked(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"rain {number}"}]


def events_of(answer: httpx2.Response) -> Iterator[str]:
    """The data of each event as it comes."""
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


class Load:
    """Clients in threads that do one thing over and over. They end when they are told to, or with their connection."""

    def __init__(self, place: RealServer) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.seen: list[Seen] = []  # what came of each request that came to an end
        self.cut: list[str] = []  # how the connections ended
        self.wrong: list[BaseException] = []

    def add(self, act: Callable[[httpx2.Client, int], Seen], num_clients: int) -> None:
        for number in range(num_clients):
            self._threads.append(threading.Thread(target=self._work, args=(act, number)))
            self._threads[-1].start()

    def num_done(self, kind: str) -> int:
        with self._lock:
            return sum(one["kind"] == kind and one["is_done"] for one in self.seen)

    def end(self) -> None:
        """Nobody may hang."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in self._threads), "a client still waits"
        assert not self.wrong, self.wrong[0]

    def _work(self, act: Callable[[httpx2.Client, int], Seen], number: int) -> None:
        try:
            self._repeat(act, number)
        except httpx2.TransportError as error:
            self.cut.append(repr(error))
        except BaseException as error:
            self.wrong.append(error)

    def _repeat(self, act: Callable[[httpx2.Client, int], Seen], number: int) -> None:
        with client_of(self._place) as client:
            while not self._is_over.is_set():
                found = act(client, number)
                with self._lock:
                    self.seen.append(found)


@contextmanager
def loaded(place: RealServer) -> Iterator[Load]:
    load = Load(place)
    try:
        yield load
    finally:
        load.end()


def chat(client: httpx2.Client, number: int) -> Seen:
    """A completion, streamed."""
    return streamed(client, number, is_stored=False)


def stored_chat(client: httpx2.Client, number: int) -> Seen:
    return streamed(client, number, is_stored=True)


def streamed(client: httpx2.Client, number: int, *, is_stored: bool) -> Seen:
    body = {**LONG, "messages": asked(number), "stream": True, "store": is_stored}
    seen: Seen = {"kind": "chat", "number": number, "is_done": False, "id": None, "text": "", "error": None}
    with client.stream("POST", CHAT, json=body) as answer:
        seen["status"] = answer.status_code
        if answer.status_code != 200:
            answer.read()
            return {**seen, "error": answer.json()["error"], "retry": answer.headers.get("retry-after")}
        for data in events_of(answer):
            if data == "[DONE]":
                seen["is_done"] = True
                continue
            event = json.loads(data)
            seen["error"] = event.get("error")
            seen["id"] = event.get("id") or seen["id"]
            for choice in event.get("choices", ()):
                seen["text"] += choice["delta"].get("content") or ""
    return seen


def respond(client: httpx2.Client, number: int) -> Seen:
    """A response, streamed."""
    body = {"model": "tiny", "input": f"rain {number}", "temperature": 0, "max_output_tokens": 60, "stream": True}
    seen: Seen = {"kind": "response", "is_done": False, "id": None, "body": None, "error": None}
    with client.stream("POST", RESPONSES, json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for data in events_of(answer):
            event = json.loads(data)
            if event["type"] in ("response.completed", "response.incomplete"):
                seen |= {"is_done": True, "id": event["response"]["id"], "body": event["response"]}
            seen["error"] = seen["error"] or (event if event["type"] == "error" else None)
    return seen


def upload(client: httpx2.Client, number: int) -> Seen:
    content = os.urandom(random.randrange(1, 200_000))
    answer = client.post("/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"})
    assert answer.status_code == 200, answer.text
    return {"kind": "file", "is_done": True, "id": answer.json()["id"], "content": content}


# The engine.


def test_an_engine_that_is_killed_under_load_is_told_of_and_the_next_gives_the_same_answers(place: RealServer) -> None:
    with loaded(place) as load:
        load.add(chat, 16)
        for _ in range(2):
            known = load.num_done("chat")
            await_that(lambda known=known: load.num_done("chat") >= known + 16, 300)  # type: ignore[misc]
            os.kill(place.child("fledge.infer"), signal.SIGKILL)
        known = load.num_done("chat")
        await_that(lambda: load.num_done("chat") >= known + 32, 300)
    assert not load.cut, "the server ended a connection"
    cut_short = [one for one in load.seen if not one["is_done"]]
    assert cut_short, "no answer was under way"
    for one in cut_short:
        assert (one["status"], one["error"]["code"]) in ((200, DIED), (503, DIED)), one
        assert one["status"] == 200 or int(one["retry"]) >= 1
    assert any(one["status"] == 200 for one in cut_short), "nobody was told of it in a stream"
    said = {(one["number"], one["text"]) for one in load.seen if one["is_done"]}
    assert len(said) == 16, "an answer changed with the engine"
    with client_of(place) as client:
        await_that(lambda: client.get(place.url.removesuffix("/v1") + "/health").status_code == 200, 60)


# The server.


def test_a_server_that_is_killed_under_load_loses_no_finished_answer_and_no_file(place: RealServer) -> None:
    num_lines = 80
    with loaded(place) as load:
        load.add(stored_chat, 6)
        load.add(respond, 3)
        load.add(upload, 3)
        await_that(lambda: load.num_done("chat") >= 6 and load.num_done("response") >= 3, 600)
        with client_of(place) as client:
            waiting = client.post(RESPONSES, json={"model": "tiny", "input": "snow", "background": True}).json()
            batch = begin_batch(client, num_lines)
            await_that(lambda: client.get(f"/batches/{batch}").json()["request_counts"]["completed"] > 0, 300)
            unfinished = client.post(RESPONSES, json={**long_response(), "background": True}).json()
        place.kill()
    assert len(load.cut) == 12, "a client was not told"
    place.start()
    with client_of(place) as client:
        for one in [one for one in load.seen if one["is_done"]]:
            assert_kept(client, one)
        listed = client.get("/files", params={"purpose": "batch"}).json()["data"]
        for file in listed:  # those too whose upload was not acknowledged any more
            assert len(client.get(f"/files/{file['id']}/content").content) == file["bytes"]
        assert_batch_ends(client, batch, num_lines)
        ends = ("completed", "incomplete", "failed")
        for response in (waiting, unfinished):  # the latter once its server is known to be dead
            await_that(lambda at=response["id"]: client.get(f"{RESPONSES}/{at}").json()["status"] in ends, 300)  # type: ignore[misc]
        told = client.get(f"{RESPONSES}/{unfinished['id']}").json()
        assert told["status"] == "failed"
        assert told["error"]["code"] == "server_error"
    assert all(one["is_done"] or one["error"] for one in load.seen), "a stream ended as if it were whole"


def long_response() -> dict[str, Any]:
    """One that is not finished when the server is killed right away."""
    return {"model": "tiny", "input": "rain", "max_output_tokens": 230, "temperature": 2, "top_p": 1}


def begin_batch(client: httpx2.Client, num_lines: int) -> str:
    lines = [
        {"custom_id": f"line-{i}", "method": "POST", "url": f"/v1{CHAT}", "body": {**LONG, "messages": asked(i)}}
        for i in range(num_lines)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.post("/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"}).json()["id"]
    wanted = {"input_file_id": file, "endpoint": f"/v1{CHAT}", "completion_window": "24h"}
    batch: str = client.post("/batches", json=wanted).json()["id"]
    return batch


def assert_kept(client: httpx2.Client, one: Seen) -> None:
    """What was told as finished is there, word for word."""
    if one["kind"] == "chat":
        stored = client.get(f"{CHAT}/{one['id']}").json()
        assert stored["choices"][0]["message"]["content"] == one["text"]
    elif one["kind"] == "response":
        assert client.get(f"{RESPONSES}/{one['id']}").json() == one["body"]
    else:
        assert client.get(f"/files/{one['id']}/content").content == one["content"]


def assert_batch_ends(client: httpx2.Client, batch: str, num_lines: int) -> None:
    """The batch is gone on with, and every line is answered once."""
    await_that(lambda: client.get(f"/batches/{batch}").json()["status"] == "completed", 600)
    ended = client.get(f"/batches/{batch}").json()
    assert ended["request_counts"] == {"total": num_lines, "completed": num_lines, "failed": 0}
    output = client.get(f"/files/{ended['output_file_id']}/content").text
    answered = Counter(json.loads(line)["custom_id"] for line in output.splitlines())
    assert answered == Counter(f"line-{i}" for i in range(num_lines))
