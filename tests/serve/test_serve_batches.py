"""/v1/batches: files in, files out, by the routes that everybody uses; stopped, expired, killed and gone on with."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serve_fakes import FakeEngine, Server, serving
from sqlalchemy import text

from fledge.serve import batch_input
from fledge.serve.state import ServerConfig
from fledge.store import batches as stored
from fledge.store.keys import KeyRequest, create_key, list_keys, revoke_key
from fledge.store.tables import BatchRow

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
BATCHES = "/v1/batches"


def line(name: str, **body: Any) -> dict[str, Any]:
    asked = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], **body}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": asked}


async def upload(client: httpx2.AsyncClient, lines: list[Any], purpose: str = "batch") -> str:
    content = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines).encode()
    made = await client.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": purpose})
    found: str = made.json()["id"]
    return found


async def begin(client: httpx2.AsyncClient, lines: list[Any], **others: Any) -> dict[str, Any]:
    body = {"input_file_id": await upload(client, lines), "endpoint": CHAT, "completion_window": "24h", **others}
    answer = await client.post(BATCHES, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def ended(client: httpx2.AsyncClient, batch: dict[str, Any], seconds: float = 120) -> dict[str, Any]:
    async with asyncio.timeout(seconds):
        while True:
            found: dict[str, Any] = (await client.get(f"{BATCHES}/{batch['id']}")).json()
            if found["status"] in ("completed", "failed", "expired", "cancelled"):
                return found
            await asyncio.sleep(0.05)


async def until(client: httpx2.AsyncClient, batch: dict[str, Any], num_done: int) -> None:
    async with asyncio.timeout(120):
        while True:
            counts = (await client.get(f"{BATCHES}/{batch['id']}")).json()["request_counts"]
            if counts["completed"] + counts["failed"] >= num_done:
                return
            await asyncio.sleep(0.05)


async def content(client: httpx2.AsyncClient, file_id: str) -> list[dict[str, Any]]:
    return [json.loads(one) for one in (await client.get(f"/v1/files/{file_id}/content")).text.splitlines()]


async def test_a_batch_answers_line_by_line_as_the_live_routes_do(client: httpx2.AsyncClient, server: Server) -> None:
    lines = [line("a"), line("b", temperature=9), line("c", model="nope"), line("d", stream=True), line("e", n=2)]
    batch = await begin(
        client, lines, metadata={"a": "b"}, output_expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (batch["status"], batch["object"], batch["metadata"]) == ("validating", "batch", {"a": "b"})
    done = await ended(client, batch)
    assert done["status"] == "completed"
    assert done["request_counts"] == {"total": 5, "completed": 2, "failed": 3}
    assert done["model"] == "fake"
    assert done["created_at"] <= done["in_progress_at"] <= done["finalizing_at"] <= done["completed_at"]
    output = await content(client, done["output_file_id"])
    assert [one["custom_id"] for one in output] == ["a", "e"]
    live = (await client.post(CHAT, json=lines[0]["body"])).json()
    told = output[0]["response"]
    assert (told["status_code"], told["request_id"][:4]) == (200, "req_")
    assert told["body"]["choices"] == live["choices"]
    assert len(output[1]["response"]["body"]["choices"]) == 2
    assert done["usage"]["total_tokens"] == sum(one["response"]["body"]["usage"]["total_tokens"] for one in output)
    errors = await content(client, done["error_file_id"])
    found = {one["custom_id"]: one["response"]["status_code"] for one in errors}
    assert found == {"b": 400, "c": 404, "d": 400}
    assert errors[0]["response"]["body"]["error"]["param"] == "temperature"
    file = (await client.get(f"/v1/files/{done['output_file_id']}")).json()
    assert (file["purpose"], file["expires_at"] is not None) == ("batch_output", True)
    listed = (await client.get(BATCHES)).json()
    assert [one["id"] for one in listed["data"]] == [batch["id"]]
    assert await stored.read_lines(server.state.database, batch["id"], -1) == []


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        ([], "empty_file", None),
        (["not json"], "invalid_json_line", 1),
        (["[1]"], "invalid_json_line", 1),
        ([line("a"), line("a")], "duplicate_custom_id", 2),
        ([{**line("a"), "custom_id": 5}], "invalid_custom_id", 1),
        ([{**line("a"), "custom_id": "\ud800"}], "invalid_custom_id", 1),
        ([{**line("a"), "method": "GET"}], "invalid_method", 1),
        ([line("a"), "", {**line("b"), "url": "/v1/files"}], "mismatched_endpoint", 2),
        ([{**line("a"), "body": "x"}], "invalid_body", 1),
    ],
)
async def test_a_file_that_cannot_be_run_fails_the_batch_and_names_the_line(
    client: httpx2.AsyncClient, lines: list[Any], code: str, number: int | None
) -> None:
    failed = await ended(client, await begin(client, lines))
    assert (failed["status"], failed["errors"]["object"]) == ("failed", "list")
    error = failed["errors"]["data"][0]
    assert (error["code"], error["line"]) == (code, number)
    assert "output_file_id" not in failed


async def test_what_cannot_be_a_batch_is_refused_at_once(client: httpx2.AsyncClient) -> None:
    good = {"input_file_id": await upload(client, [line("a")]), "endpoint": CHAT, "completion_window": "24h"}
    wrong = {
        "input_file_id": "file-nope",
        "endpoint": "/v1/images/generations",
        "completion_window": "1h",
        "nope": 1,
    }
    for param, value in wrong.items():
        answer = await client.post(BATCHES, json={**good, param: value})
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["param"] == param
    other = await upload(client, [line("a")], "fine-tune")
    answer = await client.post(BATCHES, json={**good, "input_file_id": other})
    assert answer.json()["error"]["code"] == "invalid_file_purpose"


def test_limits_of_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line(f"{i}")) + "\n" for i in range(4)))
    assert batch_input.check(path, CHAT) == batch_input.Checked(4, "fake", ())
    assert [one.number for one in batch_input.read(path, CHAT, but={0, 2})] == [1, 3]
    monkeypatch.setattr(batch_input, "MAX_LINES", 3)
    assert batch_input.check(path, CHAT).errors[0]["code"] == "too_many_tasks"
    monkeypatch.setattr(batch_input, "MAX_BYTES", 10)
    assert batch_input.check(path, CHAT).errors[0]["code"] == "file_too_large"


async def test_a_cancelled_batch_keeps_what_was_answered(client: httpx2.AsyncClient, server: Server) -> None:
    server.engine.gate, server.engine.gate_place = asyncio.Event(), 2
    batch = await begin(client, [line("bad", temperature=9), *(line(f"{i}") for i in range(40))])
    await until(client, batch, 1)
    cancelling = (await client.post(f"{BATCHES}/{batch['id']}/cancel")).json()
    assert cancelling["status"] == "cancelling"
    done = await ended(client, batch)
    assert (done["status"], done["request_counts"]["total"]) == ("cancelled", 41)
    assert [one["custom_id"] for one in await content(client, done["error_file_id"])] == ["bad"]
    assert server.engine.live == set()
    again = await client.post(f"{BATCHES}/{batch['id']}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "invalid_batch_status")


async def test_what_is_not_answered_in_time_is_in_the_error_file(client: httpx2.AsyncClient, server: Server) -> None:
    server.engine.gate = asyncio.Event()
    batch = await begin(client, [line("bad", temperature=9), line("slow"), line("slower")])
    await until(client, batch, 1)
    runner_sees = "UPDATE batches SET expires_at = 0, worker = NULL"
    async with server.state.database.writing() as session:
        await session.execute(text(runner_sees))
    done = await ended(client, batch)
    assert (done["status"], done["request_counts"]) == ("expired", {"total": 3, "completed": 0, "failed": 3})
    errors = await content(client, done["error_file_id"])
    assert [one["custom_id"] for one in errors] == ["bad", "slow", "slower"]
    assert [one["error"] and one["error"]["code"] for one in errors] == [None, "batch_expired", "batch_expired"]


async def test_a_batch_goes_on_with_the_next_server_and_no_line_is_lost_or_doubled(tmp_path: Path) -> None:
    """The first server is not closed but forgotten, as by kill -9: its lease runs out and it writes no more."""
    names = [f"{i}" for i in range(30)]
    engine = FakeEngine()
    async with serving(tmp_path, engine=engine) as first, first.client() as client:
        engine.gate, engine.gate_place = asyncio.Event(), 0
        server_lines = [line(name) for name in names]
        batch = await begin(client, server_lines)
        while len(engine.live) < 16:
            await asyncio.sleep(0.02)
        engine.gate.set()
        engine.gate = None
        engine.delay_seconds = 0.02
        await until(client, batch, 16)
        async with first.state.database.writing() as session:
            await session.execute(text("UPDATE batches SET worker = 'dead', leased_until = 0"))
        key = first.keys["alice"]
        async with serving(tmp_path, engine=FakeEngine("second")) as second:
            second.keys["alice"] = key
            async with second.client() as other:
                done = await ended(other, batch)
                output = await content(other, done["output_file_id"])
    assert done["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
    assert [one["custom_id"] for one in output] == names
    said = [one["response"]["body"]["choices"][0]["message"]["content"] for one in output]
    assert said.count(engine.text) >= 16
    assert set(said) <= {engine.text, "second"}


async def test_a_revoked_key_runs_no_further_line(client: httpx2.AsyncClient, server: Server) -> None:
    database = server.state.database
    server.keys["carol"], row = await create_key(database, KeyRequest("carol"))
    async with server.client("carol") as carol:
        server.engine.gate = asyncio.Event()
        batch = await begin(carol, [line("a")])
        await revoke_key(database, row.id)
        async with database.writing() as session:
            await session.execute(text("UPDATE batches SET worker = NULL, status = 'in_progress'"))
        server.keys["carol"], _ = await create_key(database, KeyRequest("carol"))
    async with server.client("carol") as carol:
        done = await ended(carol, batch)
    assert (done["status"], done["errors"]["data"][0]["code"]) == ("failed", "invalid_api_key")
    assert len(await list_keys(database)) == 4


async def test_a_line_waits_for_its_keys_budget(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from fledge.serve import batches_run

    monkeypatch.setattr(batches_run, "MAX_WAIT", 0.05)
    request = KeyRequest("carol", requests_per_minute=600)
    server.keys["carol"], _ = await create_key(server.state.database, request)
    async with server.client("carol") as carol:
        batch = await begin(carol, [line(f"{i}") for i in range(5)])
        [budget] = [found.requests for found in server.state.keys._limiter._budgets.values() if found.requests]
        budget.take(int(budget.level))
        row = await completed(server, batch["id"])
    assert row.counts == {"total": 5, "completed": 5, "failed": 0}


async def completed(server: Server, batch_id: str) -> BatchRow:
    """Looked at from behind, which costs no budget."""
    async with asyncio.timeout(120):
        while True:
            row = await stored.find_batch(server.state.database, "carol", batch_id)
            if row is not None and row.status == "completed":
                return row
            await asyncio.sleep(0.1)


async def test_anothers_files_and_models_are_not_there_in_a_batch_either(server: Server) -> None:
    from fledge.store.models import register_model

    await register_model(server.state.database, "ft-alice", owner="alice", path="tuned")
    async with server.client("alice") as alice, server.client("bob") as bob:
        file = await upload(alice, [line("a")])
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        assert (await bob.post(BATCHES, json=body)).status_code == 404
        done = await ended(bob, await begin(bob, [line("a", model="ft-alice"), line("b", model="nope")]))
        errors = await content(bob, done["error_file_id"])
        told = [one["response"]["body"]["error"]["message"] for one in errors]
        assert told[0].replace("ft-alice", "X") == told[1].replace("nope", "X")


async def test_a_server_without_batches_to_run_is_closed_at_once(tmp_path: Path) -> None:
    async with asyncio.timeout(60):
        async with serving(tmp_path, ServerConfig(drain_seconds=0.1)):
            pass
