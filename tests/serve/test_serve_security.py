"""Who may do what: keys, scopes, budgets, two users, and bodies that are too much."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx2
import pytest
from serve_fakes import Server

from fledge.serve.auth import PUBLIC
from fledge.serve.guard import Limits, nesting
from fledge.serve.limits import Bucket, Budgets, spell_duration
from fledge.serve.state import ServerConfig
from fledge.store.keys import KeyRequest, create_key, revoke_key
from fledge.store.models import register_model

pytestmark = pytest.mark.anyio
HELLO = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
CHAT = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    "PermissionRequest": {"project_ids": ["x"]},
    "ItemsRequest": {"items": [{"role": "user", "content": "x"}]},
}


def operations(server: Server) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, path, operation) of every route that our own document names."""
    paths = server.app.openapi()["paths"]
    return [(method.upper(), path, found) for path, by in paths.items() for method, found in by.items()]


async def test_4_only_the_listed_routes_answer_without_a_key(server: Server) -> None:
    assert sorted(PUBLIC) == ["/health", "/openapi.json"]
    async with server.client(None) as client:
        for method, path, _ in operations(server):
            answer = await client.request(method, path.replace("{", "").replace("}", ""))
            expected = 200 if path in PUBLIC else 401
            assert answer.status_code == expected, f"{method} {path}"
            if expected == 401:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert (await client.get("/openapi.json")).status_code == 200


async def make_everything(server: Server, user: str) -> dict[str, str]:
    """One object of every kind, by the name of the path parameter that names it."""
    async with server.client(user) as client:
        stored = (await client.post(CHAT, json={**HELLO, "store": True})).json()["id"]
        response = (await client.post("/v1/responses", json={"input": "Hi"})).json()["id"]
        upload = {"file": ("a.jsonl", b"{}")}
        file = (await client.post("/v1/files", files=upload, data={"purpose": "batch"})).json()["id"]
        kept = await client.post(CHAT, json={**HELLO, "stream": True}, headers={"x-fledge-keep": "true"})
        await register_model(server.state.database, f"ft-{user}", owner=user, path="tuned")
        tuned = await make_tuned(client, user)
    return {
        "completion_id": stored,
        "response_id": response,
        "file_id": file,
        "job_id": kept.headers["x-fledge-job"],
        "model": f"ft-{user}",
        **tuned,
    }


async def make_tuned(client: httpx2.AsyncClient, user: str) -> dict[str, str]:
    upload = {"file": ("a.jsonl", b"{}")}
    file = (await client.post("/v1/files", files=upload, data={"purpose": "fine-tune"})).json()["id"]
    job = await client.post("/v1/fine_tuning/jobs", json={"model": "fake", "training_file": file})
    place = f"/v1/fine_tuning/checkpoints/ft-{user}/permissions"
    granted = await client.post(place, json={"project_ids": ["somebody"]})
    return {
        "fine_tuning_job_id": job.json()["id"],
        "fine_tuned_model_checkpoint": f"ft-{user}",
        "permission_id": granted.json()["data"][0]["id"],
        **await make_batch(client),
        **await make_conversation(client),
    }


async def make_conversation(client: httpx2.AsyncClient) -> dict[str, str]:
    items = [{"id": f"item-{client.headers['authorization'][-8:]}", "role": "user", "content": "Hi"}]
    made = await client.post("/v1/conversations", json={"items": items})
    return {"conversation_id": made.json()["id"], "item_id": items[0]["id"]}


async def make_batch(client: httpx2.AsyncClient) -> dict[str, str]:
    file = (await client.post("/v1/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "batch"})).json()["id"]
    body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    return {"batch_id": (await client.post("/v1/batches", json=body)).json()["id"]}


def body_of(operation: dict[str, Any]) -> dict[str, Any] | None:
    """What an operation that takes a body is sent."""
    if not operation.get("requestBody"):
        return None
    schema = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    return BODIES.get(schema, {"metadata": {"a": "b"}})


async def ask(
    client: httpx2.AsyncClient, method: str, path: str, ids: dict[str, str], body: dict[str, Any] | None
) -> tuple[int, str]:
    """The status and the answer, in which the id is blacked out."""
    answer = await client.request(method, path.replace(":path}", "}").format(**ids), json=body)
    text = answer.text
    for value in ids.values():
        text = text.replace(value, "ID")
    return answer.status_code, text


async def test_1_anothers_object_and_none_are_the_same_404_on_every_route(server: Server) -> None:
    alices = await make_everything(server, "alice")
    seen = 0
    async with server.client("bob") as bob:
        for method, path, operation in operations(server):
            names = [one["name"] for one in operation.get("parameters", []) if one["in"] == "path"]
            assert set(names) <= set(alices), f"{path}: the matrix does not know how to make a {names}"
            if names:
                body = body_of(operation)
                theirs = await ask(bob, method, path, alices, body)
                nobodys = await ask(bob, method, path, dict.fromkeys(alices, "nothing-like-it"), body)
                assert theirs == nobodys, f"{method} {path}"
                assert theirs[0] == 404, f"{method} {path}: {theirs}"
                seen += 1
    assert seen >= 15
    async with server.client("alice") as alice:
        assert (await alice.get(f"/v1/files/{alices['file_id']}/content")).content == b"{}"
        assert (await alice.get(f"{CHAT}/{alices['completion_id']}")).json()["metadata"] == {}


async def test_1_ids_in_bodies_and_lists_are_owned_as_well(server: Server) -> None:
    alices = await make_everything(server, "alice")
    async with server.client("bob") as bob:
        answer = await bob.post("/v1/responses", json={"input": "x", "previous_response_id": alices["response_id"]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "previous_response_id")
        assert (await bob.post(CHAT, json={**HELLO, "model": "ft-alice"})).status_code == 404
        for path in (CHAT, "/v1/files"):
            assert (await bob.get(path)).json()["data"] == []
            assert (await bob.get(f"{path}?after={alices['file_id']}")).status_code == 400
        assert "ft-alice" not in (await bob.get("/v1/models")).text


async def test_5_a_wrong_or_revoked_key_is_a_401_that_does_not_repeat_it(server: Server) -> None:
    key, row = await create_key(server.state.database, KeyRequest("carol"))
    server.keys["carol"] = key
    async with server.client("carol") as client:
        assert (await client.get("/v1/models")).status_code == 200
        await revoke_key(server.state.database, row.id)
        server.state.keys._known.clear()  # two seconds later
        answer = await client.get("/v1/models")
        assert answer.status_code == 401
        assert key not in answer.text
        for header in ("", "Bearer", "Basic abc", f"Bearer {key}x", "Bearer " + "x" * 10_000):
            assert (await client.get("/v1/models", headers={"authorization": header})).status_code == 401


async def test_a_key_does_what_its_scopes_say(server: Server) -> None:
    server.keys["carol"], _ = await create_key(server.state.database, KeyRequest("carol", scopes=("models",)))
    async with server.client("carol") as client:
        assert (await client.get("/v1/models")).status_code == 200
        for method, path in (("POST", CHAT), ("GET", "/v1/files"), ("GET", "/metrics")):
            answer = await client.request(method, path, json=HELLO if method == "POST" else None)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_scope")


async def test_budgets_are_kept_and_told_truly(server: Server) -> None:
    request = KeyRequest("carol", requests_per_minute=3, tokens_per_minute=1000)
    server.keys["carol"], _ = await create_key(server.state.database, request)
    async with server.client("carol") as client:
        first = await client.post(CHAT, json={**HELLO, "max_tokens": 900})
        told = first.headers
        assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("3", "2")
        # Charged with 900, given back what was not generated.
        used = first.json()["usage"]["total_tokens"]
        assert abs(int(told["x-ratelimit-remaining-tokens"]) - (1000 - used)) <= 60
        second = await client.get("/v1/models")
        assert abs(int(second.headers["x-ratelimit-remaining-tokens"]) - (1000 - used)) <= 60
        too_large = await client.post(CHAT, json={**HELLO, "max_tokens": 2000})
        assert (too_large.status_code, too_large.headers["x-should-retry"]) == (429, "false")
        fourth = await client.get("/v1/models")
        assert fourth.status_code == 429
        assert int(fourth.headers["retry-after"]) >= 1
        assert fourth.json()["error"]["code"] == "rate_limit_exceeded"


def test_a_bucket_fills_evenly_and_is_never_overdrawn() -> None:
    time = [0.0]
    bucket = Bucket(60, clock=lambda: time[0])
    assert bucket.take(60) == 0
    assert bucket.take(30) == 30
    time[0] = 30
    assert bucket.take(30) == 0
    assert (bucket.level, bucket.reset_seconds) == (0, 60)
    bucket.give(1000)
    assert bucket.level == 60
    assert Budgets(None, None).headers() == {}
    assert [spell_duration(seconds) for seconds in (0.02, 1.5, 360)] == ["20ms", "1.5s", "6m0s"]


async def test_19_depth_and_size_are_bounded(server: Server) -> None:
    json_type = {"content-type": "application/json"}
    async with server.client() as client:
        for text in ("[" * 10_000, '{"a":' * 10_000, "[" * 129 + "]" * 129):
            answer = await client.post(CHAT, content=text, headers=json_type)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_deep")
        answer = await client.post(CHAT, content="not json", headers=json_type)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
        answer = await client.post(CHAT, content="", headers=json_type)
        assert answer.status_code == 400
        large = json.dumps({**HELLO, "user": "x" * (17 << 20)})
        answer = await client.post(CHAT, content=large, headers=json_type)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        for length in ("1" * 5000, "-1", "x"):
            headers = {**json_type, "content-length": length}
            assert (await client.post(CHAT, content="{}", headers=headers)).status_code == 413
        for path in ("/v1/files/a%00b", "/v1/files?after=%00"):
            assert (await client.get(path)).status_code == 400


def test_brackets_in_strings_do_not_count() -> None:
    assert nesting(b'{"a": "' + b"[" * 5000 + b'\\"["}') <= 16
    assert nesting(b"[" * 40 + b"]" * 40 + b"[" * 30) == 40


@pytest.mark.parametrize("end", [b"", b"\\", b'"'])
def test_19_a_string_that_never_ends_is_looked_through_once(end: bytes) -> None:
    began = time.process_time()
    assert nesting(b"[" * 20 + b'"' + b'\\"' * 200_000 + end) == 20
    assert time.process_time() - began < 1, "the time grows with the square of the length"


def test_the_server_is_bounded_by_default() -> None:
    config = ServerConfig()
    assert (config.max_answers, config.limits) == (128, Limits(16 << 20, 512 << 20, 128, 60))


async def test_21_answers_are_bounded_over_all_prompts(server: Server) -> None:
    async with server.client() as client:
        answer = await client.post("/v1/completions", json={"model": "fake", "prompt": ["a"] * 2, "n": 100})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


async def test_28_the_log_holds_no_prompt_no_answer_and_no_key(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="fledge")
    async with server.client() as client:
        answer = await client.post(CHAT, json={**HELLO, "messages": [{"role": "user", "content": "SECRETWORD"}]})
    lines = "\n".join(record.getMessage() for record in caplog.records)
    line = json.loads(next(one.getMessage() for one in caplog.records if one.name == "fledge.access"))
    assert (line["route"], line["status"], line["owner"]) == (CHAT, 200, "alice")
    assert line["request"] == answer.headers["x-request-id"]
    for secret in ("SECRETWORD", server.engine.text, server.keys["alice"]):
        assert secret not in lines


async def test_13_an_uploads_name_is_only_ever_a_name(server: Server) -> None:
    async with server.client() as client:
        for name in ("../../etc/passwd", "a\\b", 'x".html', "名.jsonl"):
            made = await client.post("/v1/files", files={"file": (name, b"data")}, data={"purpose": "batch"})
            assert made.status_code == 200, made.text
            content = await client.get(f"/v1/files/{made.json()['id']}/content")
            assert content.headers["content-disposition"].startswith("attachment; filename*=UTF-8''")
            assert content.headers["x-content-type-options"] == "nosniff"
            assert content.headers["content-type"] == "application/octet-stream"
    kept = [path for path in server.state.blobs.root.rglob("*") if path.is_file()]
    assert len(kept) == 1


async def test_8_a_client_that_is_gone_frees_its_blocks(server: Server) -> None:
    """Plain ASGI: the client sends its request and hangs up while the answer is written."""
    server.engine.gate, server.engine.gate_place = asyncio.Event(), 2
    for stream in (True, False):
        before = len(server.engine.cancelled)
        status = await hang_up(server, {**HELLO, "stream": stream})
        assert len(server.engine.cancelled) == before + 1
        assert server.engine.live == set()
        assert status in (200, 499, None)
    assert server.state.jobs.num_running == 0


async def test_a_kept_job_goes_on_and_is_come_back_to(server: Server) -> None:
    server.engine.gate, server.engine.gate_place = asyncio.Event(), 2
    body = {**HELLO, "stream": True}
    headers: list[tuple[bytes, bytes]] = []
    await hang_up(server, body, [(b"x-fledge-keep", b"true")], headers)
    assert (len(server.engine.live), server.engine.cancelled) == (1, [])
    job = dict(headers)[b"x-fledge-job"].decode()
    server.engine.gate.set()
    async with server.client() as client:
        text = (await client.get(f"/v1/jobs/{job}/events")).text
        ids = [int(line.removeprefix("id: ")) for line in text.splitlines() if line.startswith("id: ")]
        assert ids == list(range(len(ids)))
        assert text.endswith("data: [DONE]\n\n")
        again = (await client.get(f"/v1/jobs/{job}/events", headers={"last-event-id": "3"})).text
        assert again == text[text.index("id: 4\n") :]
        # The same from the database, as another process or this one after a restart would tell it.
        for _ in range(100):
            if server.state.jobs._jobs[job].is_filed:
                break
            await asyncio.sleep(0.05)
        server.state.jobs._jobs.clear()
        assert (await client.get(f"/v1/jobs/{job}/events?after=3")).text == again


async def hang_up(
    server: Server,
    body: dict[str, Any],
    headers: list[tuple[bytes, bytes]] | None = None,
    answered: list[tuple[bytes, bytes]] | None = None,
) -> int | None:
    """Send a chat request, leave once the engine is at work; the status that had been sent by then."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        while not server.engine.live:
            await asyncio.sleep(0.005)
        if body["stream"]:
            while not statuses:
                await asyncio.sleep(0.005)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
            if answered is not None:
                answered.extend(message["headers"])

    auth = [
        (b"authorization", f"Bearer {server.keys['alice']}".encode()),
        (b"content-type", b"application/json"),
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": CHAT,
    }
    scope |= {
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "headers": [*auth, *(headers or [])],
        "scheme": "http",
    }
    scope |= {"server": ("127.0.0.1", 1), "client": ("127.0.0.1", 2), "root_path": ""}
    async with asyncio.timeout(20):
        await server.app(scope, receive, send)
    return statuses[0] if statuses else None
