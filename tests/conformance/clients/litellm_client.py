"""LiteLLM as a library; what stands on it (aider, CrewAI, DSPy, OpenHands) asks in the same words."""

from __future__ import annotations

import json

import litellm
from checks import KEY, MODEL, SCHEMA, URL, Verdict, asked, decided, embedded, run, said

litellm.telemetry = False
litellm.num_retries = 0
_to = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY}
_HELLO = [{"role": "user", "content": "Hello"}]
_ASK = [{"role": "user", "content": "How is the weather in Paris?"}]
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def chat() -> None:
    found = litellm.completion(**_to, messages=_HELLO)
    said(found.choices[0].message.content)
    again = [*_HELLO, found.choices[0].message.model_dump(), {"role": "user", "content": "And now?"}]
    said(litellm.completion(**_to, messages=again).choices[0].message.content)


def stream() -> None:
    chunks = list(litellm.completion(**_to, messages=_HELLO, stream=True, stream_options={"include_usage": True}))
    said(litellm.stream_chunk_builder(chunks).choices[0].message.content)
    assert chunks[-1].usage.completion_tokens > 0


async def asynchronous() -> None:
    said((await litellm.acompletion(**_to, messages=_HELLO)).choices[0].message.content)


def tools_and_their_results() -> None:
    found = litellm.completion(**_to, messages=_ASK, tools=[_TOOL], tool_choice="required").choices[0].message
    call, *_ = found.tool_calls
    asked(call.function.name, call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "sunny"}
    assert litellm.completion(**_to, messages=[*_ASK, found, result], tools=[_TOOL]).choices[0].message


def structured_output() -> None:
    found = litellm.completion(**_to, messages=_HELLO, response_format=Verdict).choices[0].message.content
    decided(json.loads(found))


def json_schema() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}}
    found = litellm.completion(**_to, messages=_HELLO, response_format=form).choices[0].message.content
    decided(json.loads(found))


def completions() -> None:
    to = {**_to, "model": f"text-completion-openai/{MODEL}"}
    assert litellm.text_completion(**to, prompt="Once upon a time", max_tokens=20).choices[0].text


def responses() -> None:
    first = litellm.responses(**_to, input="Hello")
    said(first.output[0].content[0].text)
    again = litellm.responses(**_to, input="And now?", previous_response_id=first.id)
    said(again.output[0].content[0].text)


def responses_streamed() -> None:
    events = list(litellm.responses(**_to, input="Hello", stream=True))
    said("".join(event.delta for event in events if event.type == "response.output_text.delta"))


def embeddings() -> None:
    embedded([entry["embedding"] for entry in litellm.embedding(**_to, input=["tea", "rain"]).data], 2)


if __name__ == "__main__":
    run(globals())
