"""Haystack: its OpenAI generators and embedder."""

from __future__ import annotations

import json

from checks import KEY, MODEL, URL, Verdict, asked, decided, embedded, run, said, weather
from haystack.components.embedders import OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function
from haystack.utils import Secret

_to = {"model": MODEL, "api_base_url": URL, "api_key": Secret.from_token(KEY)}
_HELLO = [ChatMessage.from_system("Be kind."), ChatMessage.from_user("Hello")]


def _talks(kind: type) -> None:
    [first] = kind(**_to).run(_HELLO)["replies"]
    said(first.text)
    [again] = kind(**_to).run([*_HELLO, first, ChatMessage.from_user("And now?")])["replies"]
    said(again.text)
    pieces: list[str] = []
    kind(**_to, streaming_callback=lambda chunk: pieces.append(chunk.content)).run(_HELLO)
    said("".join(pieces))


def chat() -> None:
    _talks(OpenAIChatGenerator)


def tools() -> None:
    tool = create_tool_from_function(weather)
    generator = OpenAIChatGenerator(**_to, tools=[tool], generation_kwargs={"tool_choice": "required"})
    question = ChatMessage.from_user("How is the weather in Paris?")
    [answer] = generator.run([question])["replies"]
    asked(answer.tool_call.tool_name, answer.tool_call.arguments)
    result = ChatMessage.from_tool("sunny", origin=answer.tool_call)
    assert OpenAIChatGenerator(**_to, tools=[tool]).run([question, answer, result])["replies"]


def structured_output() -> None:
    generator = OpenAIChatGenerator(**_to, generation_kwargs={"response_format": Verdict})
    decided(json.loads(generator.run(_HELLO)["replies"][0].text))


def responses() -> None:
    _talks(OpenAIResponsesChatGenerator)


def embeddings() -> None:
    embedded([OpenAITextEmbedder(**_to).run("tea")["embedding"]], 1)


if __name__ == "__main__":
    run(globals())
