"""OpenAI's Agents SDK: over responses, chat completions and conversations."""

from __future__ import annotations

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIConversationsSession,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from checks import KEY, MODEL, TEXT, URL, Verdict, decided, run, said, weather
from openai import AsyncOpenAI

set_tracing_disabled(True)  # its traces go to OpenAI
_client = AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
_MODELS = {"responses": OpenAIResponsesModel, "chat": OpenAIChatCompletionsModel}
_TURNS = 3


def _agent(kind: str, **fields: object) -> Agent:
    return Agent(name="host", instructions="Be kind.", model=_MODELS[kind](MODEL, _client), **fields)


async def _answers(kind: str) -> None:
    said((await Runner.run(_agent(kind), "Hello")).final_output)


async def _streams(kind: str) -> None:
    result = Runner.run_streamed(_agent(kind), "Hello")
    deltas = [
        event.data.delta
        async for event in result.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    said("".join(deltas))
    said(result.final_output)


async def _uses_a_tool(kind: str) -> None:
    settings = ModelSettings(tool_choice="required")
    agent = _agent(kind, tools=[function_tool(weather)], model_settings=settings)
    result = await Runner.run(agent, "How is the weather in Paris?", max_turns=_TURNS)
    assert any(item.type == "tool_call_output_item" for item in result.new_items)
    said(result.final_output)


async def _decides(kind: str) -> None:
    agent = _agent(kind, output_type=Verdict, tools=[function_tool(weather)])
    decided((await Runner.run(agent, "Tea or rain?", max_turns=_TURNS)).final_output)


async def _hands_off(kind: str) -> None:
    other = Agent(name="cook", model=_MODELS[kind](MODEL, _client))
    result = await Runner.run(_agent(kind, handoffs=[other]), "Hello", max_turns=_TURNS)
    assert result.final_output
    assert TEXT is None or result.last_agent is other


async def responses() -> None:
    await _answers("responses")


async def responses_streamed() -> None:
    await _streams("responses")


async def responses_with_a_tool() -> None:
    await _uses_a_tool("responses")


async def responses_with_a_tool_and_a_schema() -> None:
    await _decides("responses")


async def responses_with_a_handoff() -> None:
    await _hands_off("responses")


async def chat() -> None:
    await _answers("chat")


async def chat_streamed() -> None:
    await _streams("chat")


async def chat_with_a_tool() -> None:
    await _uses_a_tool("chat")


async def chat_with_a_tool_and_a_schema() -> None:
    await _decides("chat")


async def chat_with_a_handoff() -> None:
    await _hands_off("chat")


async def a_session_of_its_own() -> None:
    session = SQLiteSession("talk")
    await Runner.run(_agent("responses"), "Hello", session=session)
    said((await Runner.run(_agent("responses"), "And now?", session=session)).final_output)
    assert len(await session.get_items()) == 4


async def a_session_in_conversations() -> None:
    session = OpenAIConversationsSession(openai_client=_client)
    await Runner.run(_agent("responses"), "Hello", session=session)
    said((await Runner.run(_agent("responses"), "And now?", session=session)).final_output)
    assert len(await session.get_items()) == 4
    await session.pop_item()
    await session.clear_session()


async def a_conversation_of_the_server() -> None:
    conversation = await _client.conversations.create()
    await Runner.run(_agent("responses"), "Hello", conversation_id=conversation.id)
    said((await Runner.run(_agent("responses"), "And now?", conversation_id=conversation.id)).final_output)


async def the_previous_response() -> None:
    first = await Runner.run(_agent("responses"), "Hello")
    again = await Runner.run(_agent("responses"), "And now?", previous_response_id=first.last_response_id)
    said(again.final_output)


if __name__ == "__main__":
    run(globals())
