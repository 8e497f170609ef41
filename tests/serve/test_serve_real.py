"""The server over a real engine in its own process: a tiny model, whose answers are what the engine says here."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
import torch
from real_server import write_checkpoint

from fledge.commands.serve import model_entries
from fledge.formats.checkpoint import load_model
from fledge.formats.peft import load_adapter, save_adapter
from fledge.infer.engine import Engine, EngineConfig
from fledge.layers.lora import Adapter, LoraConfig, Pair
from fledge.serve.app import make_app, make_state
from fledge.serve.hub import ModelEntry
from fledge.serve.loading import ProcessLoader, read_renderer
from fledge.serve.state import ServerConfig
from fledge.store.blobs import Blobs
from fledge.store.database import Database, sqlite_url
from fledge.store.keys import KeyRequest, create_key
from fledge.types import Conversation, Request, SamplingParams

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
HELLO = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "rain"}],
    "temperature": 0,
    "max_tokens": 12,
}


async def test_a_real_model_answers_streams_scores_embeds_and_survives_kill_9(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    database = Database(sqlite_url(tmp_path / "fledge.db"))
    await database.open()
    key, _ = await create_key(database, KeyRequest("alice"))
    loader = ProcessLoader({"num_blocks": 64, "block_size": 8}, num_threads=1)
    own = [ModelEntry("tiny", 0, "fledge", path=path)]
    state = make_state(ServerConfig(drain_seconds=1), database, Blobs(tmp_path / "blobs"), loader, own)
    app = make_app(state)
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {key}"}
    async with app.router.lifespan_context(app):
        client = httpx2.AsyncClient(transport=transport, base_url="http://x", headers=headers, timeout=300)
        async with client, state.hub.use("alice", "tiny") as model:
            first = await _post(client, "/v1/chat/completions", HELLO)
            assert first == await _post(client, "/v1/chat/completions", HELLO)
            scored = {"model": "tiny", "prompt": "rain", "echo": True, "logprobs": 2, "max_tokens": 0}
            told = (await _post(client, "/v1/completions", scored))["choices"][0]["logprobs"]
            assert "".join(told["tokens"]) == "rain"
            assert all(value <= 0 for value in told["token_logprobs"])
            embedded = await _post(client, "/v1/embeddings", {"model": "tiny", "input": ["a", "b"]})
            assert [len(one["embedding"]) for one in embedded["data"]] == [16, 16]
            form = {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "integer", "nope": 1}},
            }
            bad = await client.post("/v1/chat/completions", json={**HELLO, "response_format": form})
            assert (bad.status_code, "nope" in bad.text) == (400, True)
            process: Any = model.engine
            os.kill(process._process.pid, signal.SIGKILL)
            assert (await _answered_again(client))["choices"] == first["choices"]
    await database.close()


async def test_adapters_answer_side_by_side_over_one_engine_and_come_again_with_it(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    write_adapter(path, tmp_path / "adapter")
    own = model_entries([str(path)], [f"tiny={path}"], tmp_path, [f"tuned={path}={tmp_path / 'adapter'}"])
    database = Database(sqlite_url(tmp_path / "fledge.db"))
    await database.open()
    key, _ = await create_key(database, KeyRequest("alice"))
    loader = ProcessLoader({"num_blocks": 64, "block_size": 8}, num_threads=1)
    state = make_state(ServerConfig(drain_seconds=1), database, Blobs(tmp_path / "blobs"), loader, own)
    app = make_app(state)
    headers = {"authorization": f"Bearer {key}"}
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    expected = merged_answer(path, tmp_path / "adapter")
    async with app.router.lifespan_context(app):
        client = httpx2.AsyncClient(transport=transport, base_url="http://x", headers=headers, timeout=300)
        async with client, state.hub.use("alice", "tiny") as model:
            plain = await _post(client, "/v1/chat/completions", HELLO)
            asked = [_post(client, "/v1/chat/completions", {**HELLO, "model": name}) for name in ("tuned", "tiny") * 3]
            answers = await asyncio.gather(*asked)
            assert answers[1::2] == [plain] * 3
            assert {_text(answer) for answer in answers[::2]} == {expected} != {_text(plain)}
            assert {answer["system_fingerprint"] for answer in answers[::2]} != {plain["system_fingerprint"]}
            refusal = await client.post("/v1/embeddings", json={"model": "tuned", "input": "a"})
            assert (refusal.status_code, "model's own" in refusal.text) == (400, True)
            process: Any = model.engine
            os.kill(process._process.pid, signal.SIGKILL)
            await _answered_again(client)
            assert _text(await _post(client, "/v1/chat/completions", {**HELLO, "model": "tuned"})) == expected
    await database.close()


def _text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def write_adapter(checkpoint: Path, directory: Path) -> None:
    model = load_model(checkpoint).model
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator) for shape in ((2, 16), (64, 2))]
    pairs = {"blocks.0.mlp.up": Pair(drawn[0], drawn[1], 1.0)}
    save_adapter(Adapter(LoraConfig(rank=2, alpha=2.0), pairs), model, directory)


def merged_answer(checkpoint: Path, adapter: Path) -> str:
    """What the model says with the adapter in its weights."""
    loaded = load_model(checkpoint)
    [(name, pair)] = load_adapter(adapter, loaded.model).pairs.items()
    with torch.no_grad():
        loaded.model.get_parameter(f"{name}.weight").add_(pair.scale * pair.b @ pair.a)
    prompt = loaded.renderer.prompt(Conversation.of(("user", "rain")))
    engine = Engine(cast(Any, loaded.model), loaded.tokenizer, EngineConfig(num_blocks=64, block_size=8))
    params = SamplingParams(max_tokens=12, temperature=0.0)
    [[answer]] = engine.generate([Request("a", prompt, params, stop_ids=loaded.renderer.stop_ids)])
    return answer.text


async def _answered_again(client: httpx2.AsyncClient) -> dict[str, Any]:
    """The next answer; until there is one, only clean 503s."""
    for _ in range(600):
        answer = await client.post("/v1/chat/completions", json=HELLO)
        if answer.status_code == 200:
            break
        assert answer.status_code == 503, answer.text
        await asyncio.sleep(0.1)
    found: dict[str, Any] = answer.json()
    return found


async def _post(client: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return {name: value for name, value in found.items() if name not in ("id", "created")}


def test_a_tokenizer_that_was_altered_is_refused(tmp_path: Path) -> None:
    from fledge.errors import CheckpointError

    path = write_checkpoint(tmp_path / "model")
    read_renderer(path)
    (path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_renderer(path)
