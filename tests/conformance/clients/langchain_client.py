"""LangChain: langchain-openai's models and embeddings, and an agent of langchain's own."""

from __future__ import annotations

from checks import KEY, MODEL, PARIS, SCHEMA, TEXT, URL, Verdict, asked, decided, embedded, run, said, weather
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

_chat = ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, max_retries=0)
_responses = ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, max_retries=0, use_responses_api=True)


def chat() -> None:
    found = _chat.invoke([("system", "Be kind."), ("user", "Hello")])
    said(found.content)
    assert found.usage_metadata["output_tokens"] > 0


def stream() -> None:
    chunks = list(_chat.stream("Hello", stream_usage=True))
    said("".join(chunk.content for chunk in chunks))
    assert any(chunk.usage_metadata for chunk in chunks)


async def batch() -> None:
    for found in await _chat.abatch(["Hello", "Good day"]):
        said(found.content)


def log_probabilities() -> None:
    found = _chat.bind(logprobs=True, top_logprobs=2).invoke("Hello")
    assert len(found.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


def tools_and_their_results() -> None:
    _call_and_answer(_chat)


def _call_and_answer(model: ChatOpenAI) -> None:
    question = HumanMessage("How is the weather in Paris?")
    answer = model.bind_tools([weather], tool_choice="any").invoke([question])
    call, *_ = answer.tool_calls
    asked(call["name"], call["args"])
    result = ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
    found = model.bind_tools([weather]).invoke([question, answer, result])
    assert found.tool_calls or found.text


def tools_streamed() -> None:
    model = _chat.bind_tools([weather], tool_choice="weather", strict=True)
    whole = None
    for chunk in model.stream("How is the weather in Paris?"):
        whole = chunk if whole is None else whole + chunk
    call, *_ = whole.tool_calls
    asked(call["name"], call["args"])


def structured_output_by_schema() -> None:
    decided(_chat.with_structured_output(Verdict).invoke("Tea or rain?"))


def structured_output_by_tool() -> None:
    decided(_chat.with_structured_output(Verdict, method="function_calling").invoke("Tea or rain?"))


def structured_output_as_json() -> None:
    found = _chat.with_structured_output({"title": "verdict", **SCHEMA}, method="json_schema").invoke("Tea or rain?")
    decided(found)


def agent() -> None:
    found = create_agent(_chat, [weather]).invoke({"messages": [("user", "How is the weather in Paris?")]})
    kinds = [message.type for message in found["messages"]]
    assert kinds == ["human", "ai", "tool", "ai"] if TEXT is not None else kinds[:2] == ["human", "ai"], kinds
    assert TEXT is None or found["messages"][2].content == PARIS


def agent_with_tools_and_a_schema() -> None:
    for strategy in (ProviderStrategy(Verdict), ToolStrategy(Verdict)):
        maker = create_agent(_chat, [weather], response_format=strategy)
        decided(maker.invoke({"messages": [("user", "How is the weather in Paris?")]})["structured_response"])


def responses() -> None:
    first = _responses.invoke("Hello")
    said(first.text)
    said(_responses.invoke([HumanMessage("Hello"), first, HumanMessage("And now?")]).text)
    said(_responses.invoke("And now?", previous_response_id=first.response_metadata["id"]).text)


def responses_streamed() -> None:
    said("".join(chunk.text for chunk in _responses.stream("Hello")))


def responses_tools_and_their_results() -> None:
    _call_and_answer(_responses)


def responses_structured_output() -> None:
    decided(_responses.with_structured_output(Verdict).invoke("Tea or rain?"))


def completions() -> None:
    model = OpenAI(model=MODEL, base_url=URL, api_key=KEY, max_tokens=20)
    assert model.invoke("Once upon a time")
    assert "".join(model.stream("Once upon a time"))


def embeddings() -> None:
    # The texts as they are: by default they are cut into tokens of a model of OpenAI's.
    model = OpenAIEmbeddings(model=MODEL, base_url=URL, api_key=KEY, check_embedding_ctx_length=False)
    embedded(model.embed_documents(["tea", "rain"]), 2)
    embedded([model.embed_query("tea")], 1)


if __name__ == "__main__":
    run(globals())
