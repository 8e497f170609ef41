"""The official Python client against the server, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from fake_server import listening
from openai import OpenAI
from serve_fakes import Server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    with listening(Path(tmp_path_factory.mktemp("server"))) as found:
        yield found


@pytest.fixture
def client(running: tuple[Server, str]) -> Iterator[OpenAI]:
    server, url = running
    with OpenAI(base_url=url, api_key=server.keys["alice"], max_retries=0) as found:
        yield found


def test_chat_completion_whole_and_streamed(client: OpenAI, running: tuple[Server, str]) -> None:
    text = running[0].engine.text
    messages = [{"role": "user", "content": "Hi"}]
    whole = client.chat.completions.create(model="fake", messages=messages)  # type: ignore[call-overload]
    assert whole.choices[0].message.content == text
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        model="fake", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_errors_become_the_clients_exceptions(client: OpenAI, running: tuple[Server, str]) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "x"}], temperature=9)
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=running[1], api_key="wrong", max_retries=0).models.list()
