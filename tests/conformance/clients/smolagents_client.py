"""smolagents: its OpenAI model and an agent that calls tools."""

from __future__ import annotations

import json
from typing import ClassVar

from checks import KEY, MODEL, TEXT, URL, Verdict, decided, run, said
from smolagents import ChatMessage, OpenAIModel, Tool, ToolCallingAgent

_model = OpenAIModel(model_id=MODEL, api_base=URL, api_key=KEY)
_HELLO = [ChatMessage(role="user", content=[{"type": "text", "text": "Hello"}])]


class _Weather(Tool):
    name = "weather"
    description = "Tells the weather."
    inputs: ClassVar[dict[str, dict[str, str]]] = {"city": {"type": "string", "description": "Name of a city"}}
    output_type = "string"

    def forward(self, city: str) -> str:
        return f"It is sunny in {city}."


def chat() -> None:
    said(_model.generate(_HELLO).content)


def stream() -> None:
    said("".join(delta.content or "" for delta in _model.generate_stream(_HELLO)))


def structured_output() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": Verdict.model_json_schema()}}
    decided(json.loads(_model.generate(_HELLO, response_format=form).content))


def agent() -> None:
    agent = ToolCallingAgent([_Weather()], _model, max_steps=3, verbosity_level=0)
    answer = agent.run("How is the weather in Paris?")
    assert answer == "tea" if TEXT is not None else answer is not None, answer


if __name__ == "__main__":
    run(globals())
