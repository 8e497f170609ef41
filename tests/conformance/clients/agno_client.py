"""Agno: agents over its OpenAI-like model and over responses."""

from __future__ import annotations

from agno.agent import Agent
from agno.models.openai import OpenAILike, OpenAIResponses
from checks import KEY, MODEL, URL, Verdict, decided, run, said, weather

_to = {"id": MODEL, "base_url": URL, "api_key": KEY}
_MODELS = (OpenAILike, OpenAIResponses)


def agents() -> None:
    for kind in _MODELS:
        said(Agent(model=kind(**_to), telemetry=False).run("Hello").content)


def streams() -> None:
    for kind in _MODELS:
        events = Agent(model=kind(**_to), telemetry=False).run("Hello", stream=True)
        said("".join(event.content or "" for event in events if event.event == "RunContent"))


def tools() -> None:
    for kind in _MODELS:
        agent = Agent(model=kind(**_to), tools=[weather], telemetry=False, tool_call_limit=1)
        said(agent.run("How is the weather in Paris?").content)


def structured_output() -> None:
    agent = Agent(model=OpenAIResponses(**_to), output_schema=Verdict, telemetry=False)
    decided(agent.run("Tea or rain?").content)


if __name__ == "__main__":
    run(globals())
