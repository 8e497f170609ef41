"""/v1/responses over the fake engine: events, chains, the background, and what is read again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serve_fakes import Server, serving, tokenizer
from sqlalchemy import select, update

from fledge.serve.state import ServerConfig
from fledge.store import jobs
from fledge.store.responses import add_response
from fledge.store.tables import JobRow, ResponseRow

pytestmark = pytest.mark.anyio
PATH = "/v1/responses"
ADD = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}
CALL = 'Well: <tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, whose names and numbers are what their data say."""
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    found = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert names == [event["type"] for event in found]
    numbers = [event["sequence_number"] for event in found]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return found


async def until(client: httpx2.AsyncClient, name: str, status: str) -> dict[str, Any]:
    for _ in range(400):
        body: dict[str, Any] = (await client.get(f"{PATH}/{name}")).json()
        if body["status"] == status:
            return body
        await asyncio.sleep(0.01)
    raise AssertionError(f"{body['status']}, not {status}")


async def test_a_response_comes_whole_and_is_kept(client: httpx2.AsyncClient, server: Server) -> None:
    made = (await client.post(PATH, json={"input": "Hi", "metadata": {"a": "b"}})).json()
    assert (made["status"], made["model"], made["error"]) == ("completed", "fake", None)
    assert made["output"][0]["content"][0]["text"] == server.engine.text
    assert made["usage"]["total_tokens"] == made["usage"]["input_tokens"] + made["usage"]["output_tokens"]
    assert (await client.get(f"{PATH}/{made['id']}")).json() == made
    items = (await client.get(f"{PATH}/{made['id']}/input_items")).json()["data"]
    assert [item["content"][0]["text"] for item in items] == ["Hi"]
    assert (await client.delete(f"{PATH}/{made['id']}")).status_code == 200
    for answer in (await client.delete(f"{PATH}/{made['id']}"), await client.get(f"{PATH}/{made['id']}")):
        assert answer.status_code == 404


async def test_nothing_is_kept_where_store_is_false(client: httpx2.AsyncClient) -> None:
    made = (await client.post(PATH, json={"input": "Hi", "store": False})).json()
    assert (await client.get(f"{PATH}/{made['id']}")).status_code == 404


async def test_the_events_add_up_to_the_response(client: httpx2.AsyncClient, server: Server) -> None:
    told = events((await client.post(PATH, json={"input": "Hi", "stream": True})).text)
    kinds = [event["type"] for event in told]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event["delta"] for event in told if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == server.engine.text
    assert told[0]["response"]["output"] == []
    assert told[2]["item"]["content"] == []
    assert told[-1]["response"]["output"] == [told[-2]["item"]]


async def test_text_and_calls_are_items_of_their_own(client: httpx2.AsyncClient, server: Server) -> None:
    server.engine.text = CALL
    told = events((await client.post(PATH, json={"input": "Hi", "tools": [ADD], "stream": True})).text)
    output = told[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call"]
    assert json.loads(output[1]["arguments"]) == {"x": 1}
    done = next(event for event in told if event["type"] == "response.function_call_arguments.done")
    assert (done["name"], done["output_index"]) == ("add", 1)
    result = {"type": "function_call_output", "call_id": output[1]["call_id"], "output": "2"}
    body = {"input": [result], "previous_response_id": told[-1]["response"]["id"], "tools": [ADD]}
    assert (await client.post(PATH, json=body)).status_code == 200
    read = tokenizer().decode(server.engine.requests[-1].prompt_ids)
    assert read.index("Hi") < read.index('{"name": "add", "arguments": {"x": 1}}') < read.rindex("2")


async def test_a_chain_is_read_in_order_with_the_last_instructions_alone(
    client: httpx2.AsyncClient, server: Server
) -> None:
    first = (await client.post(PATH, json={"input": "one", "instructions": "old"})).json()["id"]
    second = (await client.post(PATH, json={"input": "two", "previous_response_id": first})).json()["id"]
    await client.post(PATH, json={"input": "three", "previous_response_id": second, "instructions": "new"})
    read = tokenizer().decode(server.engine.requests[-1].prompt_ids)
    assert read == "new" + "one" + server.engine.text + "two" + server.engine.text + "three"
    await client.delete(f"{PATH}/{first}")
    answer = await client.post(PATH, json={"input": "four", "previous_response_id": second})
    assert answer.status_code == 404


async def test_a_reference_stands_for_what_a_stored_response_said(client: httpx2.AsyncClient, server: Server) -> None:
    server.engine.text = CALL
    first = (await client.post(PATH, json={"input": "Hi", "tools": [ADD]})).json()
    assert len({item["id"] for item in first["output"]}) == 2
    result = {"type": "function_call_output", "call_id": first["output"][1]["call_id"], "output": "2"}
    said, called = ({"id": item["id"]} for item in first["output"])
    for references in ([said, called], [{"type": "item_reference", **said}, {"type": "item_reference", **called}]):
        body = {"input": [{"role": "user", "content": "Hi"}, *references, result]}
        made = (await client.post(PATH, json=body)).json()
        read = tokenizer().decode(server.engine.requests[-1].prompt_ids)
        assert read.startswith("HiWell: ")
        assert read.index('{"name": "add", "arguments": {"x": 1}}') < read.rindex("2")
        items = (await client.get(f"{PATH}/{made['id']}/input_items", params={"order": "asc"})).json()["data"]
        assert items[1:3] == first["output"]
    counted = await client.post(f"{PATH}/input_tokens", json=body)
    assert counted.json()["input_tokens"] == len(server.engine.requests[-1].prompt_ids)


async def test_a_reference_to_nothing_and_to_what_is_anothers_are_the_same_404(
    client: httpx2.AsyncClient, server: Server
) -> None:
    async with server.client("bob") as bob:
        theirs = (await bob.post(PATH, json={"input": "Hi"})).json()["output"][0]["id"]
        assert (await bob.post(PATH, json={"input": [{"id": theirs}]})).status_code == 200
    unstored = (await client.post(PATH, json={"input": "Hi", "store": False})).json()["output"][0]["id"]
    gone = (await client.post(PATH, json={"input": "Hi"})).json()
    await client.delete(f"{PATH}/{gone['id']}")
    for name in (theirs, unstored, gone["output"][0]["id"], "msg_1", "x", "", "_", "msg_\0_1"):
        answer = await client.post(PATH, json={"input": [{"type": "item_reference", "id": name}]})
        expected = (404, "input[0].id") if name and "\0" not in name else (400, "input[0].id")
        assert (answer.status_code, answer.json()["error"]["param"]) == expected, answer.text


async def test_an_answer_that_is_cut_is_incomplete(client: httpx2.AsyncClient) -> None:
    made = (await client.post(PATH, json={"input": "Hi", "max_output_tokens": 2})).json()
    assert (made["status"], made["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert made["output"][0]["status"] == "incomplete"
    none = (await client.post(PATH, json={"input": "Hi", "max_output_tokens": 0})).json()
    assert (none["status"], none["output"][0]["content"][0]["text"]) == ("incomplete", "")


async def test_a_stored_stream_is_told_again_from_any_event_on(client: httpx2.AsyncClient, server: Server) -> None:
    made = (await client.post(PATH, json={"input": "Hi"})).json()
    again = events((await client.get(f"{PATH}/{made['id']}?stream=true")).text)
    assert again[-1]["response"] == made
    assert "".join(e["delta"] for e in again if e["type"] == "response.output_text.delta") == server.engine.text
    later = events((await client.get(f"{PATH}/{made['id']}?stream=true&starting_after=3")).text)
    assert later == again[4:]


async def test_a_stream_is_told_again_with_or_without_padding_whatever_it_was(client: httpx2.AsyncClient) -> None:
    for was_padded in (True, False):
        options = {"include_obfuscation": was_padded}
        asked = {"input": "Hi", "stream": True, "background": True, "stream_options": options}
        written = events((await client.post(PATH, json=asked)).text)
        place = f"{PATH}/{written[0]['response']['id']}?stream=true"
        assert events((await client.get(place)).text) == written
        bare = events((await client.get(f"{place}&include_obfuscation=false")).text)
        padded = events((await client.get(f"{place}&include_obfuscation=true")).text)
        deltas = [event for event in padded if event["type"] == "response.output_text.delta"]
        assert deltas
        assert len({len(event["delta"].encode()) + len(event["obfuscation"]) for event in deltas}) == 1
        assert not any("obfuscation" in event for event in bare)
        assert bare == [{key: event[key] for key in event if key != "obfuscation"} for event in padded]


async def test_the_background_goes_on_and_its_events_are_its_own(client: httpx2.AsyncClient, server: Server) -> None:
    server.engine.gate, server.engine.gate_place = asyncio.Event(), 3
    made = (await client.post(PATH, json={"input": "Hi", "background": True})).json()
    assert (made["status"], made["output"]) == ("queued", [])
    await until(client, made["id"], "in_progress")
    server.engine.gate.set()
    done = await until(client, made["id"], "completed")
    told = events((await client.get(f"{PATH}/{made['id']}?stream=true")).text)
    assert told[-1]["response"] == done
    assert len([e for e in told if e["type"] == "response.output_text.delta"]) > 1


async def test_the_background_is_cancelled_once_and_frees_its_blocks(
    client: httpx2.AsyncClient, server: Server
) -> None:
    server.engine.gate, server.engine.gate_place = asyncio.Event(), 3
    made = (await client.post(PATH, json={"input": "Hi", "background": True})).json()
    await until(client, made["id"], "in_progress")
    while not server.engine.live:
        await asyncio.sleep(0.01)
    assert (await client.post(f"{PATH}/{made['id']}/cancel")).json()["status"] == "cancelled"
    await until(client, made["id"], "cancelled")
    while server.engine.live:
        await asyncio.sleep(0.01)
    assert len(server.engine.cancelled) == 1
    assert (await client.post(f"{PATH}/{made['id']}/cancel")).json()["status"] == "cancelled"
    plain = (await client.post(PATH, json={"input": "x", "max_output_tokens": 0})).json()["id"]
    assert (await client.post(f"{PATH}/{plain}/cancel")).status_code == 400


async def test_a_failure_in_the_background_is_the_responses(client: httpx2.AsyncClient, server: Server) -> None:
    server.engine.dies_at = 2
    made = (await client.post(PATH, json={"input": "Hi", "background": True})).json()
    failed = await until(client, made["id"], "failed")
    assert failed["error"]["code"] == "engine_unavailable"
    told = events((await client.get(f"{PATH}/{made['id']}?stream=true")).text)
    assert [event["type"] for event in told[-2:]] == ["response.failed", "error"]


async def test_a_response_whose_server_died_has_failed(client: httpx2.AsyncClient, server: Server) -> None:
    """Before it could begin, or in the middle of it."""
    database = server.state.database
    body = {"id": "", "object": "response", "status": "in_progress", "output": [], "error": None}
    for name in ("resp_none", "resp_dead"):
        row = ResponseRow(id=name, created_at=1, owner="alice", status="in_progress", is_background=True, inputs=[])
        row.body = {**body, "id": name}
        await add_response(database, row)
    await jobs.add_job(database, "resp_dead", "alice", "response")
    assert (await client.get(f"{PATH}/resp_dead")).json()["status"] == "in_progress"
    async with database.writing() as session:
        await session.execute(update(JobRow).values(touched_at=1))
    await jobs.fail_dead_jobs(database)  # as every server does from time to time
    for name in ("resp_none", "resp_dead"):
        found = (await client.get(f"{PATH}/{name}")).json()
        assert (found["status"], found["error"]["code"]) == ("failed", "server_error")
    told = events((await client.get(f"{PATH}/resp_none?stream=true")).text)
    assert [event["type"] for event in told] == ["response.created", "response.in_progress", "response.failed"]


async def test_a_response_that_cannot_be_begun_leaves_nothing_behind(tmp_path: Path) -> None:
    async with serving(tmp_path, ServerConfig(max_running=0)) as server, server.client() as client:
        answer = await client.post(PATH, json={"input": "Hi", "background": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        async with server.state.database.reading() as session:
            assert await session.scalar(select(ResponseRow.id)) is None


async def test_tokens_are_counted_as_they_would_be_read(client: httpx2.AsyncClient, server: Server) -> None:
    body = {"input": "Hi there", "instructions": "be kind"}
    counted = (await client.post(f"{PATH}/input_tokens", json=body)).json()["input_tokens"]
    assert counted == (await client.post(PATH, json=body)).json()["usage"]["input_tokens"]


async def test_truncation_drops_the_oldest_but_the_system(client: httpx2.AsyncClient, server: Server) -> None:
    turns = [{"role": "user", "content": f"<{i}>" + "x" * 600} for i in range(10)]
    body = {"input": turns, "instructions": "system!", "max_output_tokens": 16}
    refused = await client.post(PATH, json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert (await client.post(PATH, json={**body, "truncation": "auto"})).status_code == 200
    read = tokenizer().decode(server.engine.requests[-1].prompt_ids)
    assert read.startswith("system!")
    assert "<0>" not in read
    assert "<9>" in read


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": [{"type": "item_reference"}]}, "input[0].id"),
    ({"input": [{"type": "reasoning", "id": "x", "summary": []}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "call_id": "x"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
    ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"input": "x", "prompt": {"id": "p"}}, "prompt"),
    ({"input": "x", "background": True, "store": False}, "background"),
    ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ({"input": "x", "nonsense": 1}, "nonsense"),
    ({"input": "x", "include": ["message.output_text.logprob"]}, "include[0]"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
async def test_what_cannot_be_honoured_is_refused_by_name(
    client: httpx2.AsyncClient, body: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        answer = await client.post(PATH, json={**body, "stream": stream})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize("wish", ["1.5e-204", "", "logprobs"])
async def test_an_unknown_wish_is_refused_wherever_it_may_be_said(client: httpx2.AsyncClient, wish: str) -> None:
    made = (await client.post(PATH, json={"input": "Hi"})).json()["id"]
    talk = (await client.post("/v1/conversations", json={"items": [{"role": "user", "content": "Hi"}]})).json()["id"]
    item = (await client.get(f"/v1/conversations/{talk}/items")).json()["first_id"]
    places = (f"{PATH}/{made}", f"{PATH}/{made}/input_items", f"/v1/conversations/{talk}/items")
    for place in (*places, f"/v1/conversations/{talk}/items/{item}"):
        for name, said in (("include", "include[0]"), ("include[]", "include[][0]")):
            known = await client.get(place, params={name: "message.output_text.logprobs"})
            assert known.status_code == 200
            answer = await client.get(place, params={name: wish})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, said), place


async def test_huge_numbers_in_a_schema_do_no_harm(client: httpx2.AsyncClient) -> None:
    parameters = {"type": "object", "properties": {"a": {"const": 10**40}}}
    answer = await client.post(PATH, json={"input": "x", "tools": [{**ADD, "parameters": parameters}]})
    assert answer.status_code in (200, 400), answer.text


async def test_parts_of_fields_that_are_without_effect_are_named_in_the_header(client: httpx2.AsyncClient) -> None:
    asked = {"model": "fake", "input": "Hi", "text": {"verbosity": "low"}}
    counted = await client.post(f"{PATH}/input_tokens", json=asked)
    assert counted.headers["x-fledge-inert"] == "text.verbosity"
    names = ["reasoning.encrypted_content", "message.output_text.logprobs"]
    answer = await client.post(PATH, json={**asked, "include": names, "user": "x"})
    assert answer.headers["x-fledge-inert"] == "text.verbosity, include.reasoning.encrypted_content, user"


async def test_what_items_and_tools_hold_beside_what_is_read_is_named(client: httpx2.AsyncClient) -> None:
    part = {"type": "input_text", "text": "Hi", "prompt_cache_breakpoint": {"mode": "explicit"}}
    form = {"type": "json_schema", "name": "x", "description": "d", "schema": {"type": "object"}}
    asked = {"input": [{"role": "user", "content": [part], "phase": "commentary"}], "text": {"format": form}}
    asked["tools"] = [{**ADD, "defer_loading": True}]
    answer = await client.post(PATH, json={"model": "fake", **asked})
    names = ["input.phase", "input.content.prompt_cache_breakpoint", "tools.defer_loading", "text.format.description"]
    assert answer.headers["x-fledge-inert"] == ", ".join(names)
    wrong = {"role": "user", "content": "x", "a\r\nb: c": 1}
    answer = await client.post(PATH, json={"model": "fake", "input": [wrong]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[0].a\r\nb: c")


async def test_a_body_that_is_no_object_is_told_of_in_words(client: httpx2.AsyncClient) -> None:
    for content in ("[]", "", "3", "null"):
        answer = await client.post(PATH, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert "body" in answer.json()["error"]["message"]
        assert "None" not in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("item", "needed"),
    [
        ({"type": "message", "role": "user"}, "'content'"),
        ({"type": "function_call", "name": "add", "arguments": "{}"}, "'call_id'"),
        ({"type": "function_call_output", "output": "3"}, "'call_id'"),
        ({"type": "compaction"}, "'encrypted_content'"),
    ],
)
async def test_an_item_that_lacks_a_field_is_told_which_it_needs(
    client: httpx2.AsyncClient, item: dict[str, Any], needed: str
) -> None:
    answer = await client.post(PATH, json={"model": "fake", "input": [item]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "input[0]", "missing_required_parameter")
    assert needed in error["message"]
