"""Inspect, the evaluation harness of the UK AI Security Institute: tasks over chat completions and responses."""

from __future__ import annotations

import tempfile

from checks import KEY, MODEL, TEXT, URL, Verdict, run
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, ResponseSchema, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import Tool, tool
from inspect_ai.util import json_schema

_NAME = f"openai-api/fledge/{MODEL}"


@tool
def _weather() -> Tool:
    async def execute(city: str) -> str:
        """Tells the weather.

        Args:
            city: Name of a city
        """
        return f"It is sunny in {city}."

    return execute


def _evaluate(task: Task, **options: object) -> None:
    model = get_model(_NAME, base_url=URL, api_key=KEY, memoize=False, **options)
    with tempfile.TemporaryDirectory() as folder:
        [log] = eval(task, model=model, log_dir=folder, display="none", message_limit=5)
    assert log.status == "success", log.error
    assert log.stats.model_usage
    accuracy = log.results.scores[0].metrics["accuracy"].value
    assert TEXT is None or accuracy == 1.0, accuracy


def _task(config: GenerateConfig | None = None, target: str = TEXT or "") -> Task:
    samples = [Sample(input="Hello", target=target), Sample(input="Good day", target=target)]
    return Task(samples, solver=generate(), scorer=includes(), config=config or GenerateConfig(max_tokens=40))


def a_task() -> None:
    _evaluate(_task())


def a_task_over_responses() -> None:
    _evaluate(_task(), responses_api=True)


def settings() -> None:
    config = GenerateConfig(temperature=0.5, top_p=0.9, seed=1, num_choices=2, logprobs=True, top_logprobs=2)
    _evaluate(_task(config.model_copy(update={"stop_seqs": ["~~"], "max_tokens": 40})))


def structured_output() -> None:
    schema = ResponseSchema(name="verdict", json_schema=json_schema(Verdict))
    _evaluate(_task(GenerateConfig(response_schema=schema, max_tokens=100), target="tea" if TEXT else ""))


def a_tool() -> None:
    samples = [Sample(input="How is the weather in Paris?", target=TEXT or "")]
    _evaluate(Task(samples, solver=[use_tools(_weather()), generate()], scorer=includes()))


def a_tool_over_responses() -> None:
    samples = [Sample(input="How is the weather in Paris?", target=TEXT or "")]
    _evaluate(Task(samples, solver=[use_tools(_weather()), generate()], scorer=includes()), responses_api=True)


if __name__ == "__main__":
    run(globals())
