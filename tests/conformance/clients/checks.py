"""What the checks of all clients share: where the server is, what it says, and how their results are told.

Each file beside this one is run in an environment that has its client (../clients.py): a script whose functions are
the checks, named by what they do. Source of the calls: the client's own documentation.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

URL, KEY = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
MODEL = os.environ["CLIENTS_MODEL"]
TEXT = os.environ.get("CLIENTS_TEXT")  # what the server says; without it, whatever a model does


class Verdict(BaseModel):
    """Whether it is to be tea or rain."""

    answer: str
    sure: bool


SCHEMA = {**Verdict.model_json_schema(), "additionalProperties": False}
PARIS = "It is sunny in Paris."


def weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: Name of a city
    """
    return f"It is sunny in {city}."


def said(text: object) -> None:
    assert isinstance(text, str), text
    assert text == TEXT if TEXT is not None else text, text


def decided(verdict: object) -> None:
    verdict = Verdict.model_validate(verdict, from_attributes=True)
    assert TEXT is None or (verdict.answer, verdict.sure) == ("tea", True), verdict


def asked(name: str, arguments: object) -> None:
    """A call of the tool `weather`."""
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name == "weather", name
    assert isinstance(arguments, dict), arguments
    assert arguments == {"city": "Paris"} if TEXT is not None else set(arguments) == {"city"}, arguments


def embedded(vectors: Any, count: int) -> None:
    vectors = [list(map(float, vector)) for vector in vectors]
    assert len(vectors) == count
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-3 for vector in vectors)


def run(module: dict[str, Any]) -> None:
    """Run the functions of this module, in order or those that are named, and print a line of JSON for each."""
    checks = [
        value
        for name, value in module.items()
        if inspect.isfunction(value) and value.__module__ == "__main__" and not name.startswith("_")
    ]
    wanted = sys.argv[1:]
    loop = asyncio.new_event_loop()  # one for all: clients keep their connections
    for check in checks:
        if wanted and check.__name__ not in wanted:
            continue
        error = _failure(check, loop)
        print(json.dumps({"check": check.__name__.replace("_", " "), "error": error}), flush=True)


def _failure(check: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> str | None:
    try:
        found = check()
        if inspect.isawaitable(found):
            loop.run_until_complete(found)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:500]
    return None
