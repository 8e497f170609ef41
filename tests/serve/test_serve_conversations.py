"""/v1/conversations, the responses that go on with them, and their compaction."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from serve_fakes import Server, tokenizer

pytestmark = pytest.mark.anyio
PLACE = "/v1/conversations"
RESPONSES = "/v1/responses"


def said(text: str, role: str = "user") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": text}


async def begin(client: httpx2.AsyncClient, **body: Any) -> str:
    answer = await client.post(PLACE, json=body)
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["id"]
    return found


async def items(client: httpx2.AsyncClient, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await client.get(f"{PLACE}/{name}/items?order=asc&limit=100")).json()["data"]
    return found


def text_of(item: dict[str, Any]) -> str:
    return "".join(part["text"] for part in item["content"])


async def test_a_conversation_is_made_labelled_and_deleted(client: httpx2.AsyncClient) -> None:
    name = await begin(client, metadata={"topic": "tea"})
    shown = (await client.get(f"{PLACE}/{name}")).json()
    assert (shown["object"], shown["metadata"]) == ("conversation", {"topic": "tea"})
    changed = (await client.post(f"{PLACE}/{name}", json={"metadata": {"topic": "rain"}})).json()
    assert changed == {**shown, "metadata": {"topic": "rain"}}
    assert (await client.delete(f"{PLACE}/{name}")).json()["object"] == "conversation.deleted"
    assert (await client.delete(f"{PLACE}/{name}")).status_code == 404
    assert (await client.post(PLACE)).status_code == 200  # as published, without a body


async def test_items_are_added_listed_found_and_deleted(client: httpx2.AsyncClient) -> None:
    name = await begin(client, items=[said("one")])
    added = (
        await client.post(f"{PLACE}/{name}/items", json={"items": [said("two"), {**said("three"), "id": "m3"}]})
    ).json()
    assert (added["object"], added["last_id"]) == ("list", "m3")
    assert [text_of(item) for item in await items(client, name)] == ["one", "two", "three"]
    newest = (await client.get(f"{PLACE}/{name}/items?limit=1")).json()
    assert (newest["data"][0]["id"], newest["has_more"]) == ("m3", True)
    after = (await client.get(f"{PLACE}/{name}/items?limit=1&after=m3")).json()
    assert text_of(after["data"][0]) == "two"
    assert text_of((await client.get(f"{PLACE}/{name}/items/m3")).json()) == "three"
    assert (await client.delete(f"{PLACE}/{name}/items/m3")).json()["id"] == name
    assert (await client.get(f"{PLACE}/{name}/items/m3")).status_code == 404
    assert (await client.delete(f"{PLACE}/{name}/items/m3")).status_code == 404


@pytest.mark.parametrize(
    "wrong",
    [
        {"items": [said("x")] * 21},
        {"items": [{"type": "computer_call"}]},
        {"items": [{"type": "message", "role": "user"}]},
        {"items": [{**said("x"), "id": "a/b"}]},
        {"items": [{"type": "compaction", "encrypted_content": "bm9wZQ=="}]},
        {"nope": 1},
    ],
)
async def test_what_is_no_item_is_refused(client: httpx2.AsyncClient, wrong: dict[str, Any]) -> None:
    answer = await client.post(PLACE, json=wrong)
    assert answer.status_code == 400, answer.text


async def test_responses_read_a_conversation_and_add_to_it(client: httpx2.AsyncClient, server: Server) -> None:
    name = await begin(client, items=[said("I like tea", "user")])
    first = (await client.post(RESPONSES, json={"input": "And you?", "conversation": name})).json()
    assert first["conversation"] == {"id": name}
    stream = await client.post(RESPONSES, json={"input": "Why?", "conversation": {"id": name}, "stream": True})
    assert "response.completed" in stream.text
    found = await items(client, name)
    assert [item["role"] for item in found] == ["user", "user", "assistant", "user", "assistant"]
    assert [text_of(item) for item in found][1::2] == ["And you?", "Why?"]
    read = tokenizer().decode(server.engine.requests[-1].prompt_ids)
    for text in ("I like tea", "And you?", server.engine.text, "Why?"):
        assert text in read
    counted = (await client.post(f"{RESPONSES}/input_tokens", json={"input": "So?", "conversation": name})).json()
    assert counted["input_tokens"] > len(server.engine.requests[-1].prompt_ids)


async def test_one_cannot_go_on_with_two_pasts_or_with_anothers(client: httpx2.AsyncClient, server: Server) -> None:
    name = await begin(client)
    first = (await client.post(RESPONSES, json={"input": "Hi"})).json()["id"]
    both = {"input": "x", "conversation": name, "previous_response_id": first}
    answer = await client.post(RESPONSES, json=both)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "conversation")
    async with server.client("bob") as bob:
        for given in (name, "conv_nope"):
            answer = await bob.post(RESPONSES, json={"input": "x", "conversation": given})
            assert (answer.status_code, answer.json()["error"]["param"]) == (404, "conversation")


async def test_a_failed_response_adds_nothing(client: httpx2.AsyncClient, server: Server) -> None:
    name = await begin(client)
    server.engine.refusal = "no"
    assert (await client.post(RESPONSES, json={"input": "x", "conversation": name})).status_code == 400
    assert await items(client, name) == []


async def test_compaction_keeps_what_was_asked_and_sums_up_the_rest(client: httpx2.AsyncClient, server: Server) -> None:
    first = (await client.post(RESPONSES, json={"input": "What is tea?"})).json()["id"]
    body = {"model": "fake", "previous_response_id": first, "input": "And rain?", "instructions": "Be kind."}
    compacted = (await client.post(f"{RESPONSES}/compact", json=body)).json()
    assert compacted["object"] == "response.compaction"
    *kept, summary = compacted["output"]
    assert [text_of(item) for item in kept] == ["What is tea?", "And rain?"]
    assert (summary["type"], compacted["usage"]["output_tokens"] > 0) == ("compaction", True)
    assert "Be kind." in tokenizer().decode(server.engine.requests[-1].prompt_ids)
    # What comes out goes in again, and the model reads the summary.
    again = await client.post(RESPONSES, json={"input": [*compacted["output"], said("Go on")]})
    assert again.status_code == 200, again.text
    read = tokenizer().decode(server.engine.requests[-1].prompt_ids)
    assert f"in short: {server.engine.text}" in read
    assert "What is tea?" in read


async def test_compaction_needs_its_model_and_an_owner(client: httpx2.AsyncClient, server: Server) -> None:
    assert (await client.post(f"{RESPONSES}/compact", json={"input": "x"})).json()["error"]["param"] == "model"
    first = (await client.post(RESPONSES, json={"input": "Hi"})).json()["id"]
    async with server.client("bob") as bob:
        answer = await bob.post(f"{RESPONSES}/compact", json={"model": "fake", "previous_response_id": first})
        assert answer.status_code == 404


async def test_an_item_that_is_there_already_stays_and_is_told_of_as_it_is(client: httpx2.AsyncClient) -> None:
    made = (await client.post("/v1/conversations", json={})).json()["id"]
    place = f"/v1/conversations/{made}/items"
    for text in ("first", "second"):
        item = {"id": "msg_1", "role": "user", "content": text}
        told = (await client.post(place, json={"items": [item]})).json()["data"]
        assert [one["content"][0]["text"] for one in told] == ["first"]
    assert (await client.get(f"{place}/msg_1")).json()["content"][0]["text"] == "first"


async def test_what_an_item_holds_beside_what_is_read_is_named_in_the_header(client: httpx2.AsyncClient) -> None:
    items = [{"role": "user", "content": "x", "phase": "commentary"}]
    made = await client.post("/v1/conversations", json={"items": items})
    added = await client.post(f"/v1/conversations/{made.json()['id']}/items", json={"items": items})
    for answer in (made, added):
        assert (answer.status_code, answer.headers["x-fledge-inert"]) == (200, "items.phase")
