"""/v1/moderations in the published form, and moderation in-line: before the model is asked, before a word leaves."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai.types import ModerationCreateResponse
from serve_fakes import FakeEngine, Server, serving

from fledge.errors import ConfigError
from fledge.safety.categories import NAMES
from fledge.safety.guard import GuardConfig
from fledge.serve.app import make_state
from fledge.serve.state import ServerConfig
from fledge.text import constitution

pytestmark = pytest.mark.anyio
CHAT, RESPONSES, MODERATIONS = "/v1/chat/completions", "/v1/responses", "/v1/moderations"
BLOCK = GuardConfig(input="block", output="block", hold_chars=12, context_chars=24)


def hello(content: str = "Hi", **more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": content}], **more}


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Server]:
    config = ServerConfig(drain_seconds=0.5, guard=BLOCK)
    async with serving(tmp_path, config, FakeEngine("All is well. And then a hateful word, and more of it.")) as server:
        yield server


async def streamed(client: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = (await client.post(path, json={**body, "stream": True})).text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


# The endpoint.


@pytest.mark.parametrize(
    ("given", "num_results"),
    [
        ("a hateful text", 1),
        ("", 1),
        (["a", "a hateful text"], 2),
        ([{"type": "text", "text": "a hateful"}, {"type": "text", "text": "text"}], 1),
    ],
)
async def test_every_published_form_of_input_is_answered_in_the_published_form(
    client: httpx2.AsyncClient, given: Any, num_results: int
) -> None:
    answer = await client.post(MODERATIONS, json={"input": given})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    ModerationCreateResponse.model_validate(body, strict=True)
    assert body["id"].startswith("modr-")
    assert len(body["results"]) == num_results
    last = body["results"][-1]
    assert last["flagged"] is bool(given)
    assert last["categories"]["hate"] is bool(given)
    for part in ("categories", "category_scores", "category_applied_input_types"):
        assert tuple(last[part]) == NAMES
    assert last["category_applied_input_types"]["sexual/minors"] == []


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": 1}, 400, "input"),
        ({}, 400, "input"),
        ({"input": [{"type": "image_url", "image_url": {"url": "data:,"}}]}, 400, "input[0].type"),
        ({"input": [{"type": "text"}]}, 400, "input[0].text"),
        ({"input": "x", "model": "gpt"}, 404, "model"),
        ({"input": ["x"] * 2049}, 400, "input"),
        ({"input": "x" * 1_000_001}, 400, "input"),
        ({"input": "x", "other": 1}, 400, "other"),
    ],
)
async def test_what_cannot_be_judged_is_refused_by_name(
    client: httpx2.AsyncClient, body: dict[str, Any], status: int, param: str
) -> None:
    answer = await client.post(MODERATIONS, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


async def test_without_a_model_the_error_names_the_command_that_makes_one(server: Server) -> None:
    server.app.state.fledge = dataclasses.replace(server.state, moderator=None)
    async with server.client() as client:
        answer = await client.post(MODERATIONS, json={"input": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "moderation_unavailable")
        assert "fledge moderation train" in answer.json()["error"]["message"]
        assert answer.headers["x-should-retry"] == "false"
        wished = await client.post(CHAT, json=hello(moderation={"model": "x"}))
        assert (wished.status_code, wished.json()["error"]["param"]) == (400, "moderation")


async def test_what_was_judged_once_is_not_judged_again(client: httpx2.AsyncClient, server: Server) -> None:
    for _ in range(3):
        assert (await client.post(MODERATIONS, json={"input": ["one", "two", "one"]})).status_code == 200
    assert server.state.moderator is not None
    assert server.state.moderator.classifier.judged == ["one", "two"]  # type: ignore[attr-defined]


def test_a_server_that_is_to_block_needs_a_model() -> None:
    with pytest.raises(ConfigError, match="fledge moderation train"):
        make_state(ServerConfig(guard=BLOCK), None, None, None, [])  # type: ignore[arg-type]


# In-line: input.


@pytest.mark.parametrize("role", ["user", "tool"])
async def test_a_flagged_input_is_refused_with_the_reason_and_the_model_is_not_asked(
    guarded: Server, role: str
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    messages.append({"role": role, "content": "something hateful", "tool_call_id": "1"})
    async with guarded.client() as client:
        answer = (await client.post(CHAT, json={"model": "fake", "messages": messages, "n": 2})).json()
    assert guarded.engine.requests == []
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["content_filter"] * 2
    message = answer["choices"][0]["message"]
    assert message["content"] is None
    law = constitution.load()
    for part in ("hate", "0.90", "0.50", "no-hate", f"{law.name} {law.version}", law.rule("no-hate").en):
        assert part in message["refusal"]


async def test_a_refusal_is_in_the_language_of_what_was_asked(guarded: Server) -> None:
    async with guarded.client() as client:
        answer = (await client.post(CHAT, json=hello("请告诉我怎样使用暴力"))).json()
    assert constitution.load().rule("no-dangerous-help").zh in answer["choices"][0]["message"]["refusal"]


async def test_a_system_message_is_the_operators_and_is_not_judged(guarded: Server) -> None:
    messages = [{"role": "system", "content": "Never be hateful."}, {"role": "user", "content": "Hi"}]
    async with guarded.client() as client:
        await client.post(CHAT, json={"model": "fake", "messages": messages})
    assert len(guarded.engine.requests) == 1


async def test_plain_completions_are_guarded_as_well(guarded: Server) -> None:
    async with guarded.client() as client:
        refused = (await client.post("/v1/completions", json={"model": "fake", "prompt": "hateful"})).json()
        assert (refused["choices"][0]["finish_reason"], refused["choices"][0]["text"]) == ("content_filter", "")
        body = {"model": "fake", "prompt": "Hi", "max_tokens": 500}
        answered = (await client.post("/v1/completions", json=body)).json()
        assert (answered["choices"][0]["finish_reason"], answered["choices"][0]["text"]) == ("content_filter", "")


# In-line: output.


async def test_a_flagged_answer_does_not_leave(guarded: Server) -> None:
    async with guarded.client() as client:
        answer = (await client.post(CHAT, json=hello())).json()
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("content_filter", None)
    assert "answer was flagged as hate" in choice["message"]["refusal"]


async def test_a_stream_ends_before_the_flagged_words(guarded: Server) -> None:
    async with guarded.client() as client:
        chunks = await streamed(client, CHAT, hello())
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    said = "".join(delta.get("content") or "" for delta in deltas)
    assert said
    assert "All is well. And then a hateful".startswith(said)
    assert "hate" not in said
    assert "flagged as hate" in "".join(delta.get("refusal") or "" for delta in deltas)
    assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
    # Nobody waits for the rest: the engine's request was ended.
    assert guarded.engine.live == set()
    assert len(guarded.engine.cancelled) == 1


async def test_a_harmless_stream_says_what_it_says_without_a_guard(guarded: Server, server: Server) -> None:
    guarded.engine.text = server.engine.text = "Quite harmless, from the first word to the very last one. 你好"
    async with guarded.client() as first, server.client() as second:
        with_guard, without = [await streamed(client, CHAT, hello()) for client in (first, second)]
    texts = ["".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) for chunks in (with_guard, without)]
    assert texts[0] == texts[1] == server.engine.text
    assert with_guard[-1]["choices"][0]["finish_reason"] == "stop"


async def test_every_character_was_part_of_a_checked_text_before_it_left(guarded: Server) -> None:
    """The word stands across a border of what is held back; it is found because the text before it is looked at too."""
    classifier = guarded.state.moderator.classifier  # type: ignore[union-attr]
    guarded.engine.text = "aaaa bbbb cccc dddd eeee ffff gggg hhhh"
    async with guarded.client() as client:
        await streamed(client, CHAT, hello())
    checked = [text for text in classifier.judged if text != "Hi"]  # type: ignore[attr-defined]
    assert checked[0] == guarded.engine.text[: len(checked[0])]
    assert checked[-1].endswith("hhhh")
    for earlier, later in itertools.pairwise(checked):
        assert earlier[-4:] in later, "no look back"


async def test_a_response_says_why_it_is_incomplete(guarded: Server) -> None:
    async with guarded.client() as client:
        answer = (await client.post(RESPONSES, json={"input": "Hi"})).json()
        assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "content_filter"})
        assert answer["output"][-1]["content"][0]["type"] == "refusal"
        events = await streamed(client, RESPONSES, {"input": "hateful"})
        kinds = [event["type"] for event in events]
        assert "response.refusal.delta" in kinds
        assert "response.refusal.done" in kinds
        assert kinds[-1] == "response.incomplete"
        # Built upon, and told again from the database.
        later = await client.post(RESPONSES, json={"input": "And?", "previous_response_id": answer["id"]})
        assert later.status_code == 200
        again = await client.get(f"{RESPONSES}/{answer['id']}?stream=true")
        assert "response.refusal.done" in again.text


# In-line: what a request may ask for.


async def test_a_request_may_ask_for_scores(client: httpx2.AsyncClient, server: Server) -> None:
    server.engine.text = "a violent answer"
    wish = {"model": "omni-moderation-latest"}
    answer = (await client.post(CHAT, json=hello("a hateful question", moderation=wish))).json()
    assert answer["choices"][0]["message"]["content"] == "a violent answer"
    found = answer["moderation"]
    assert found["input"]["type"] == "moderation_results"
    assert found["input"]["results"][0]["categories"]["hate"] is True
    assert found["output"]["results"][0]["categories"]["violence"] is True
    chunks = await streamed(client, CHAT, hello("a hateful question", moderation=wish))
    assert chunks[-1]["moderation"]["output"]["results"][0]["flagged"] is True
    response = (await client.post(RESPONSES, json={"input": "hateful", "moderation": wish})).json()
    assert response["moderation"]["input"]["categories"]["hate"] is True
    assert response["moderation"]["output"]["categories"]["violence"] is True


async def test_a_request_may_not_ask_for_a_moderation_model_that_is_not_there(client: httpx2.AsyncClient) -> None:
    for path, body in ((CHAT, hello()), (RESPONSES, {"input": "hello"})):
        answer = await client.post(path, json={**body, "moderation": {"model": "no-such-model"}})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert answer.json()["error"]["param"] == "moderation.model"


async def test_a_request_may_ask_for_blocking_and_never_for_less(guarded: Server, server: Server) -> None:
    policy = {"model": "words", "policy": {"input": {"mode": "block"}}}
    async with server.client() as client:
        answer = (await client.post(CHAT, json=hello("hateful", moderation=policy))).json()
        assert answer["choices"][0]["finish_reason"] == "content_filter"
    lenient = {"model": "words", "policy": {"input": {"mode": "score"}, "output": {"mode": "score"}}}
    async with guarded.client() as client:
        answer = (await client.post(CHAT, json=hello("hateful", moderation=lenient))).json()
        assert answer["choices"][0]["finish_reason"] == "content_filter"


async def test_where_blocking_cannot_be_judged_nothing_is_answered(guarded: Server) -> None:
    async def dead(rows: Any) -> Any:
        from fledge.errors import EngineDied

        raise EngineDied("it died")

    assert guarded.state.moderator is not None
    engine = FakeEngine()
    engine.embed = dead  # type: ignore[method-assign]
    guarded.state.moderator._engine = engine
    async with guarded.client() as client:
        answer = await client.post(CHAT, json=hello())
    assert answer.status_code == 503
    assert guarded.engine.requests == []
