"""Instructor: typed answers by tools, by JSON schema and as JSON, whole and in pieces."""

from __future__ import annotations

import instructor
from checks import KEY, MODEL, URL, Verdict, decided, run
from openai import OpenAI

_client = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
_TEA = {"model": MODEL, "messages": [{"role": "user", "content": "Tea or rain?"}], "max_retries": 0}


def _decides(mode: instructor.Mode) -> None:
    decided(instructor.from_openai(_client, mode=mode).chat.completions.create(**_TEA, response_model=Verdict))


def tools() -> None:
    _decides(instructor.Mode.TOOLS)


def strict_tools() -> None:
    _decides(instructor.Mode.TOOLS_STRICT)


def json_schema() -> None:
    _decides(instructor.Mode.JSON_SCHEMA)


def json_object() -> None:
    _decides(instructor.Mode.JSON)


def responses() -> None:
    client = instructor.from_openai(_client, mode=instructor.Mode.RESPONSES_TOOLS)
    decided(client.responses.create(model=MODEL, input="Tea or rain?", response_model=Verdict, max_retries=0))


def partial() -> None:
    client = instructor.from_openai(_client, mode=instructor.Mode.TOOLS)
    *_, last = client.chat.completions.create_partial(**_TEA, response_model=Verdict)
    decided(last)


def many() -> None:
    client = instructor.from_openai(_client, mode=instructor.Mode.JSON_SCHEMA)
    found = client.chat.completions.create_with_completion(**_TEA, response_model=Verdict)
    decided(found[0])


if __name__ == "__main__":
    run(globals())
