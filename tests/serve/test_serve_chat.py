"""Chat completions over the fake engine, in this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from serve_fakes import Server, serving

pytestmark = pytest.mark.anyio
HELLO = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(tmp_path) as running:
        yield running


async def test_an_answer_comes_whole(server: Server) -> None:
    async with server.client() as client:
        answer = await client.post("/v1/chat/completions", json=HELLO)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["choices"][0]["message"]["content"] == server.engine.text
    assert body["choices"][0]["finish_reason"] == "stop"


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_stream_joins_to_the_whole_answer(server: Server) -> None:
    async with server.client() as client:
        answer = await client.post("/v1/chat/completions", json={**HELLO, "stream": True})
    chunks = events(answer.text)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == server.engine.text
