"""Pydantic AI: agents over chat completions and responses, with tools and each way to a typed output."""

from __future__ import annotations

from checks import KEY, MODEL, URL, Verdict, decided, embedded, run, said, weather
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.embeddings import Embedder
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

_provider = OpenAIProvider(base_url=URL, api_key=KEY)
_chat, _responses = OpenAIChatModel(MODEL, provider=_provider), OpenAIResponsesModel(MODEL, provider=_provider)


async def _talks(model: object) -> None:
    agent = Agent(model, instructions="Be kind.")
    first = await agent.run("Hello")
    said(first.output)
    said((await agent.run("And now?", message_history=first.all_messages())).output)


async def _streams(model: object) -> None:
    async with Agent(model).run_stream("Hello") as result:
        pieces = [piece async for piece in result.stream_text(delta=True)]
    said("".join(pieces))


async def _uses_a_tool(model: object) -> None:
    result = await Agent(model, tools=[weather]).run("How is the weather in Paris?")
    said(result.output)


async def _decides(model: object) -> None:
    for output in (NativeOutput(Verdict), ToolOutput(Verdict)):
        decided((await Agent(model, output_type=output, tools=[weather]).run("Tea or rain?")).output)


async def chat() -> None:
    await _talks(_chat)


async def chat_streamed() -> None:
    await _streams(_chat)


async def chat_with_a_tool() -> None:
    await _uses_a_tool(_chat)


async def chat_with_a_tool_and_a_schema() -> None:
    await _decides(_chat)


async def chat_with_a_prompted_schema() -> None:
    decided((await Agent(_chat, output_type=PromptedOutput(Verdict)).run("Tea or rain?")).output)


async def responses() -> None:
    await _talks(_responses)


async def responses_streamed() -> None:
    await _streams(_responses)


async def responses_with_a_tool() -> None:
    await _uses_a_tool(_responses)


async def responses_with_a_tool_and_a_schema() -> None:
    await _decides(_responses)


async def embeddings() -> None:
    found = await Embedder(OpenAIEmbeddingModel(MODEL, provider=_provider)).embed_documents(["tea", "rain"])
    embedded(found.embeddings, 2)


if __name__ == "__main__":
    run(globals())
