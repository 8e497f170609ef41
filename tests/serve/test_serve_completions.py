"""Plain completions, embeddings, files, tokens and models over the fake engine."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from serve_fakes import Server, entries, tokenizer

from fledge.serve.chat_answer import token_text
from fledge.serve.errors import ApiError
from fledge.serve.hub import Hub, ModelEntry
from fledge.serve.text_answer import Prompt, TextChoice
from fledge.text.published import adopt_published
from fledge.text.template import TemplateRenderer
from fledge.types import TokenEvent, TokenLogprobs

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))
import sentencepiece_samples as pieced

pytestmark = pytest.mark.anyio
TEXT = "/v1/completions"


def chunks(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def complete(client: httpx2.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(TEXT, json={"model": "fake", **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_every_prompt_gets_its_n_answers_in_order(client: httpx2.AsyncClient, server: Server) -> None:
    body = await complete(client, prompt=["a", "b"], n=2, max_tokens=3)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    read = [tokenizer().decode(request.prompt_ids) for request in server.engine.requests]
    assert sorted(read) == ["a", "b"]
    assert all(request.prompt_ids[0] == tokenizer().end_of_text_id for request in server.engine.requests)
    assert body["usage"]["completion_tokens"] == 12


async def test_token_prompts_are_read_as_they_are(client: httpx2.AsyncClient, server: Server) -> None:
    await complete(client, prompt=[20, 21, 22])
    assert server.engine.requests[-1].prompt_ids == (20, 21, 22)
    assert server.engine.requests[-1].params.max_tokens == 16
    await complete(client, prompt=[[20], [21, 22]])
    assert {request.prompt_ids for request in server.engine.requests[-2:]} == {(20,), (21, 22)}


async def test_echo_puts_the_prompt_and_its_logprobs_before_the_answer(
    client: httpx2.AsyncClient, server: Server
) -> None:
    server.engine.text = "xyz"
    whole = (await complete(client, prompt="The quick", echo=True, logprobs=1, max_tokens=3))["choices"][0]
    assert whole["text"] == "The quickxyz"
    told = whole["logprobs"]
    assert "".join(told["tokens"]) == whole["text"]
    joined = [whole["text"][start:].startswith(t) for start, t in zip(told["text_offset"], told["tokens"], strict=True)]
    assert all(joined)
    assert len({len(values) for values in told.values()}) == 1
    scored = (await complete(client, prompt="The quick", echo=True, logprobs=1, max_tokens=0))["choices"][0]
    assert (scored["text"], scored["finish_reason"]) == ("The quick", "length")
    assert scored["logprobs"]["tokens"] == told["tokens"][: len(scored["logprobs"]["tokens"])]
    numbers = await complete(client, prompt=[20, 21], echo=True, logprobs=0, max_tokens=1)
    assert numbers["choices"][0]["logprobs"]["token_logprobs"][0] is None  # nothing came before it


async def test_of_token_prompts_every_token_is_told_so_that_a_client_may_count(
    client: httpx2.AsyncClient, server: Server
) -> None:
    end = tokenizer().end_of_text_id
    server.engine.text = ""  # the answer is the token that ends it
    for prompt in ([end, 40, 41], [40, end, 41], [end]):
        choice = (await complete(client, prompt=prompt, echo=True, logprobs=1, max_tokens=1))["choices"][0]
        told = choice["logprobs"]
        assert {len(values) for values in told.values()} == {len(prompt) + 1}
        assert told["token_logprobs"] == [None, *[-1.0] * (len(prompt) - 1), -0.5]
        assert choice["text"] == tokenizer().decode(prompt)
        offsets = [len(tokenizer().decode(prompt[:i])) for i in range(len(prompt) + 1)]
        assert told["text_offset"] == offsets
    framed = (await complete(client, prompt="ab", echo=True, logprobs=1, max_tokens=0))["choices"][0]["logprobs"]
    assert "".join(framed["tokens"]) == "ab"
    assert framed["token_logprobs"] == [-1.0] * len(framed["tokens"])  # its beginning stands before the first


async def test_a_token_is_among_its_alternatives_and_the_likelier_of_equal_texts_counts(server: Server) -> None:
    model = await server.loader.load("fake", Path("fake"))
    halves = [i for i in range(model.tokenizer.vocab_size) if token_text(model, i)[0] == "\ufffd"][:2]
    choice = TextChoice(0, model, 2)
    drawn = model.tokenizer.encode("a")[0]
    told = TokenLogprobs(-3.0, 3, ((halves[0], -1.0), (halves[1], -2.0)))
    choice.take(TokenEvent(drawn, -3.0, "a", None, "r", model=told))
    assert choice.body["logprobs"]["top_logprobs"] == [{"\ufffd": -1.0, "a": -3.0}]


async def test_the_space_that_a_tokenizer_puts_before_a_text_is_no_part_of_an_echo(server: Server) -> None:
    given = pieced.published()
    renderer = TemplateRenderer(*adopt_published(given, len(pieced.pieces())))
    model = replace(await server.loader.load("fake", Path("fake")), renderer=renderer)
    ids = [renderer.tokenizer.end_of_text_id, *renderer.tokenizer.encode("bird nest é")]
    told = [TokenLogprobs(-1.0, 1, ())] * (len(ids) - 1)
    found = TextChoice(0, model, 0).begin(Prompt(ids, "bird nest é", True), told)
    assert found is not None
    assert found["logprobs"]["tokens"][:3] == [" bird", " nest", " "]
    assert found["logprobs"]["text_offset"][:4] == [0, 4, 9, 10]


async def test_an_answer_continues_a_text_and_not_a_chat(client: httpx2.AsyncClient, server: Server) -> None:
    await complete(client, prompt="a")
    assert server.engine.requests[-1].continues
    await client.post("/v1/chat/completions", json={"model": "fake", "messages": [{"role": "user", "content": "a"}]})
    assert not server.engine.requests[-1].continues


async def test_a_stream_joins_to_the_whole(client: httpx2.AsyncClient) -> None:
    fields = {"prompt": ["a", "b"], "n": 2, "echo": True, "max_tokens": 5}
    whole = await complete(client, **fields)
    options = {"include_usage": True}
    answer = await client.post(TEXT, json={"model": "fake", **fields, "stream": True, "stream_options": options})
    told = chunks(answer.text)
    for choice in whole["choices"]:
        own = [c for chunk in told for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
    assert (told[-1]["choices"], told[-1]["usage"]) == ([], whole["usage"])


async def test_a_suffix_frames_the_prompt_as_it_was_taught(client: httpx2.AsyncClient, server: Server) -> None:
    await complete(client, prompt="ab", suffix="cd")
    shown = tokenizer().pieces(server.engine.requests[-1].prompt_ids)
    assert [piece for piece in shown if piece.startswith("<|")] == [
        "<|endoftext|>",
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
    ]
    assert "".join(piece for piece in shown if not piece.startswith("<|")) == "abcd"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
        ({"prompt": "a", "best_of": 3, "stream": True}, "best_of"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": [99999]}, "prompt[0]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "a", "max_tokens": 10**9}, "messages"),
    ],
)
async def test_what_cannot_be_done_is_refused(client: httpx2.AsyncClient, fields: dict[str, Any], param: str) -> None:
    answer = await client.post(TEXT, json={"model": "fake", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


async def test_embeddings_are_of_length_1_in_both_spellings(client: httpx2.AsyncClient) -> None:
    body = {"model": "fake", "input": ["a", "b"], "encoding_format": "float"}
    plain = (await client.post("/v1/embeddings", json=body)).json()["data"]
    coded = (await client.post("/v1/embeddings", json={**body, "encoding_format": "base64"})).json()["data"]
    for one, other in zip(plain, coded, strict=True):
        vector = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        np.testing.assert_array_equal(vector, np.array(one["embedding"], np.float32))
        assert abs(float(np.linalg.norm(vector)) - 1) < 1e-6
    short = (await client.post("/v1/embeddings", json={**body, "dimensions": 3})).json()["data"][0]["embedding"]
    assert len(short) == 3
    assert abs(float(np.linalg.norm(short)) - 1) < 1e-6
    for wrong in (
        {"input": ""},
        {"input": []},
        {"input": [99999]},
        {"dimensions": 9},
        {"input": "x" * 50_000},
    ):
        assert (await client.post("/v1/embeddings", json={**body, **wrong})).status_code == 400


async def test_texts_become_tokens_and_back(client: httpx2.AsyncClient) -> None:
    told = (await client.post("/tokenize", json={"model": "fake", "prompt": "Hello 你好"})).json()
    assert told["count"] == len(told["tokens"])
    back = await client.post("/detokenize", json={"model": "fake", "tokens": told["tokens"]})
    assert back.json() == {"prompt": "Hello 你好"}
    assert (await client.post("/detokenize", json={"model": "fake", "tokens": [99999]})).status_code == 400
    messages = [{"role": "user", "content": "x"}]
    chat = (
        await client.post("/tokenize", json={"model": "fake", "messages": messages, "return_token_strs": True})
    ).json()
    assert chat["token_strs"][-1] == "<|assistant|>"
    about = (await client.get("/tokenizer_info")).json()
    assert about["vocab_size"] == tokenizer().vocab_size
    assert about["special_tokens"][about["eos_token"]] == tokenizer().end_of_text_id
    assert about["special_tokens"][about["pad_token"]] == tokenizer().pad_id
    by_the_first = (await client.post("/tokenize", json={"prompt": "Hello", "add_special_tokens": False})).json()
    assert (await client.post("/detokenize", json={"tokens": by_the_first["tokens"]})).json() == {"prompt": "Hello"}


async def test_files_come_back_as_they_went(client: httpx2.AsyncClient) -> None:
    content = bytes(range(256)) * 5000
    made = await client.post("/v1/files", files={"file": ("a.bin", content)}, data={"purpose": "batch"})
    file = made.json()
    assert (file["bytes"], file["filename"]) == (len(content), "a.bin")
    assert (await client.get(f"/v1/files/{file['id']}/content")).content == content
    for data in ({"purpose": "nonsense"}, {}, {"purpose": "batch", "expires_after[seconds]": "3600"}):
        answer = await client.post("/v1/files", files={"file": ("a", b"x")}, data=data)
        assert answer.status_code == 400, answer.text
    seconds = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}
    assert (await client.post("/v1/files", files={"file": ("a", b"x")}, data=seconds)).status_code == 400
    assert (await client.get("/v1/files?purpose=batch")).json()["data"][0]["id"] == file["id"]
    assert (await client.get("/v1/files?purpose=vision")).json()["data"] == []


async def test_metrics_count_what_was_done(client: httpx2.AsyncClient) -> None:
    used = (await complete(client, prompt=["a", "b"], max_tokens=3))["usage"]
    text = (await client.get("/metrics")).text
    assert f'vllm:generation_tokens_total{{model_name="fake"}} {float(used["completion_tokens"])}' in text
    assert f'vllm:prompt_tokens_total{{model_name="fake"}} {float(used["prompt_tokens"])}' in text
    assert 'vllm:kv_cache_usage_perc{model_name="fake"} 0.25' in text


async def test_models_are_loaded_on_demand_and_make_room(server: Server) -> None:
    loader, database = server.loader, server.state.database
    own = [*entries("a", "b", "c"), ModelEntry("alias", 0, "fledge", target="a")]
    hub = Hub(database, loader, own, max_bytes=200, patience=0.05)
    async with hub.use("alice", "alias") as model, hub.use("alice", "b"):
        assert model.name == "a"
        with pytest.raises(ApiError, match="no memory"):
            await hub.warm("c")
    await hub.warm("a")
    async with hub.use("alice", "c"):
        assert sorted(one.name for one in hub.loaded()) == ["a", "c"]  # b was not used for longest
    assert [path.name for path in loader.loaded] == ["a", "b", "c"]
    await hub.close()


async def test_models_that_do_not_fit_side_by_side_take_turns(server: Server) -> None:
    """Two readers of one model relieve each other without a gap, and the other model is answered all the same."""
    hub = Hub(server.state.database, server.loader, entries("a", "b"), max_bytes=100, patience=10.0, turn=0.0)
    has_ended = asyncio.Event()

    async def keep_busy() -> None:
        while not has_ended.is_set():
            async with hub.use("alice", "a"):
                await asyncio.sleep(0.02)

    await hub.warm("a")
    readers = [asyncio.create_task(keep_busy())]
    await asyncio.sleep(0.01)
    readers.append(asyncio.create_task(keep_busy()))
    await asyncio.sleep(0.03)
    async with asyncio.timeout(5), hub.use("bob", "b") as model:
        assert model.name == "b"
    await asyncio.sleep(0.05)
    has_ended.set()
    await asyncio.gather(*readers)
    assert [path.name for path in server.loader.loaded] == ["a", "b", "a"]
    await hub.close()


async def test_who_gives_up_waiting_for_room_holds_up_nobody(server: Server) -> None:
    hub = Hub(server.state.database, server.loader, entries("a", "b"), max_bytes=100, patience=60.0, turn=0.0)
    async with hub.use("alice", "a"):
        waiting = asyncio.create_task(hub.warm("b"))
        behind = asyncio.create_task(hub.warm("a"))
        await asyncio.sleep(0.05)
        assert not behind.done()
        waiting.cancel()
        async with asyncio.timeout(5):
            await behind
    await hub.close()


async def test_a_model_that_was_just_loaded_is_open_to_those_who_come_after(server: Server) -> None:
    """Else models would be loaded and put away for every single request."""
    hub = Hub(server.state.database, server.loader, entries("a", "b"), max_bytes=100, patience=0.3, turn=60.0)
    async with hub.use("alice", "a"):
        waiting = asyncio.create_task(hub.warm("b"))
        await asyncio.sleep(0.05)
        await hub.warm("a")
        assert not waiting.done()
        with pytest.raises(ApiError, match="no memory"):
            await waiting
    await hub.close()


async def test_a_model_is_counted_by_its_own_name_whatever_it_is_asked_for_by(server: Server) -> None:
    """Not by its path, which is nobody's matter, nor by an alias in one place and its own name in another."""
    own = [ModelEntry("mine", 0, "fledge", path=Path("folder/x")), ModelEntry("gpt", 0, "fledge", target="mine")]
    server.state.hub._own = {**server.state.hub._own, **{entry.name: entry for entry in own}}
    async with server.client() as client:
        assert (await client.post("/v1/completions", json={"model": "gpt", "prompt": "a"})).status_code == 200
        assert (await client.post("/v1/embeddings", json={"model": "gpt", "input": "a"})).status_code == 200
        text = (await client.get("/metrics")).text
    assert 'vllm:num_requests_running{model_name="mine"}' in text
    assert 'vllm:generation_tokens_total{model_name="mine"}' in text
    assert "folder" not in text
    assert '"gpt"' not in text
    await server.state.hub.close()
    async with server.client() as client:
        assert "vllm:num_requests_running{" not in (await client.get("/metrics")).text


async def test_adapters_are_models_over_one_that_is_loaded_once(server: Server) -> None:
    loader = server.loader
    own = [
        *entries("a", "b"),
        *(ModelEntry(name, 0, "fledge", target="a", adapter=Path(name)) for name in ("x", "y", "damaged")),
        ModelEntry("alias", 0, "fledge", target="x"),
    ]
    hub = Hub(server.state.database, loader, own, max_bytes=100)
    async with hub.use("alice", "x") as x, hub.use("alice", "a") as a, hub.use("bob", "y") as y:
        assert [one.adapter for one in (x, a, y)] == ["x", None, "y"]
        assert x.engine is a.engine is y.engine
        async with hub.use("alice", "alias") as again:
            assert again is x
    assert (loader.loaded, loader.adapted) == ([Path("a")], ["x", "y"])
    for _ in range(2):
        with pytest.raises(ApiError, match="server's log") as refusal:
            async with hub.use("alice", "damaged"):
                pass
        assert refusal.value.status == 503
    with pytest.raises(ApiError, match="'alias' is 'a' with an adapter") as refusal:
        await hub.path_of("alice", "alias")
    assert refusal.value.status == 400
    await hub.warm("b")  # there is room for one: a goes, and its adapters with it
    async with hub.use("alice", "x") as x:
        assert x.adapter == "x"
    assert loader.adapted == ["x", "y", "damaged", "damaged", "x"]
    await hub.close()


async def test_health_says_when_an_engine_is_down(client: httpx2.AsyncClient, server: Server) -> None:
    await complete(client, prompt="a")
    assert (await client.get("/health")).json() == {"status": "ok"}
    server.engine.is_ready = False
    assert (await client.get("/health")).status_code == 503
