"""LlamaIndex: its OpenAI-like model and embedding, and an agent."""

from __future__ import annotations

from checks import KEY, MODEL, URL, Verdict, asked, decided, embedded, run, said, weather
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses

_about = {"model": MODEL, "api_base": URL, "api_key": KEY, "context_window": 512, "max_tokens": 100, "max_retries": 0}
_chat = OpenAILike(**_about, is_chat_model=True, is_function_calling_model=True)
_HELLO = [ChatMessage(role="system", content="Be kind."), ChatMessage(role="user", content="Hello")]
_tool = FunctionTool.from_defaults(weather)


def chat() -> None:
    said(_chat.chat(_HELLO).message.content)


def stream() -> None:
    said("".join(chunk.delta or "" for chunk in _chat.stream_chat(_HELLO)))


async def asynchronous() -> None:
    said((await _chat.achat(_HELLO)).message.content)


def completions() -> None:
    model = OpenAILike(**_about, is_chat_model=False)
    assert model.complete("Once upon a time").text
    assert "".join(chunk.delta for chunk in model.stream_complete("Once upon a time"))


def tools() -> None:
    found = _chat.chat_with_tools([_tool], user_msg="How is the weather in Paris?", tool_required=True)
    call, *_ = _chat.get_tool_calls_from_response(found)
    asked(call.tool_name, call.tool_kwargs)


def structured_output() -> None:
    decided(_chat.structured_predict(Verdict, PromptTemplate("Tea or rain?")))


def structured_output_by_schema() -> None:
    model = OpenAILike(**_about, is_chat_model=True, should_use_structured_outputs=True)
    decided(model.structured_predict(Verdict, PromptTemplate("Tea or rain?")))


async def agent() -> None:
    found = await FunctionAgent(tools=[_tool], llm=_chat).run("How is the weather in Paris?", max_iterations=3)
    said(found.response.content)


def responses() -> None:
    model = OpenAILikeResponses(**{k: v for k, v in _about.items() if k != "max_tokens"}, max_output_tokens=100)
    said(model.chat(_HELLO).message.content)
    said("".join(chunk.delta or "" for chunk in model.stream_chat(_HELLO)))


def embeddings() -> None:
    model = OpenAILikeEmbedding(model_name=MODEL, api_base=URL, api_key=KEY)
    embedded(model.get_text_embedding_batch(["tea", "rain"]), 2)


if __name__ == "__main__":
    run(globals())
