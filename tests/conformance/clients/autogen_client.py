"""AutoGen: its OpenAI model client and an assistant with a tool."""

from __future__ import annotations

import json

from autogen_agentchat.agents import AssistantAgent
from autogen_core import CancellationToken
from autogen_core.models import UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from checks import KEY, MODEL, URL, Verdict, decided, run, said, weather

_about = {"vision": False, "function_calling": True, "json_output": True, "structured_output": True}
_client = OpenAIChatCompletionClient(
    model=MODEL, base_url=URL, api_key=KEY, model_info={**_about, "family": "unknown"}, max_retries=0
)
_HELLO = [UserMessage(content="Hello", source="user")]


async def chat() -> None:
    said((await _client.create(_HELLO)).content)


async def stream() -> None:
    *pieces, last = [piece async for piece in _client.create_stream(_HELLO)]
    said("".join(pieces))
    said(last.content)


async def structured_output() -> None:
    decided(json.loads((await _client.create(_HELLO, json_output=Verdict)).content))


async def agent() -> None:
    agent = AssistantAgent("host", _client, tools=[weather], reflect_on_tool_use=True)
    result = await agent.run(task="How is the weather in Paris?", cancellation_token=CancellationToken())
    said(result.messages[-1].content)


if __name__ == "__main__":
    run(globals())
