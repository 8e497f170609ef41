"""The server that the ecosystems' clients talk to (clients.py): a fake engine that keeps up its end of their talks.

What an agent wants of a model: call the tool that is there, read its result, then answer, in the form that is asked
for. Which of these a request is follows from its grammar and its prompt, never from who sends it.

    python strangers.py FOLDER PORT    prints the key
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

from fake_server import make_server
from serve_fakes import FakeEngine, serving, tokenizer
from speaking import VERDICT, name_models

from fledge.types import CallPart, Request

RESULT = "It is sunny in Paris."  # clients/checks.py
_TOOL = re.compile(r'call_\d+: "\{\\"name\\": \\"([A-Za-z0-9_-]+)\\"')


class AgentsEngine(FakeEngine):
    """Calls the first tool that it may, unless the result of one is before it; then says a verdict or its text."""

    def ids_for(self, request: Request) -> list[int]:
        ids = tokenizer().encode(self._answer(request))
        return [*ids, *sorted(request.stop_ids)[:1]][: request.params.max_tokens]

    def _answer(self, request: Request) -> str:
        grammar = request.grammar
        if grammar is None:
            return VERDICT if '"sure"' in tokenizer().decode(request.prompt_ids) else self.text
        if grammar.kind != "lark":
            return VERDICT
        is_told = tokenizer().special_id("<|tool|>") in request.prompt_ids
        is_told |= RESULT in tokenizer().decode(request.prompt_ids)  # in a user's message, as some agents tell it
        tools = _TOOL.findall(grammar.text)
        if is_told and "said: " in grammar.text:
            return VERDICT if "said: %json" in grammar.text else self._last_call(tools, grammar.text) or self.text
        return _call(tools[-1] if is_told else tools[0], grammar.text) if tools else self.text

    def _last_call(self, tools: list[str], grammar: str) -> str | None:
        """A typed answer that is asked for as a tool of its own, by a client that lets the model choose."""
        typed = [tool for tool in tools if '"sure"' in _arguments(tool, tools, grammar)]
        return _call(typed[0], grammar) if typed else None


def _arguments(tool: str, tools: list[str], grammar: str) -> str:
    """The schema of this tool's arguments, as the grammar has it."""
    return next(line for line in grammar.splitlines() if line.startswith(f"arguments_{tools.index(tool)}:"))


def _call(tool: str, grammar: str) -> str:
    asked = _arguments(tool, _TOOL.findall(grammar), grammar)
    values = {"city": "Paris", "sure": True, "answer": "tea"}
    given = {name: value for name, value in values.items() if f'"{name}"' in asked}
    return CallPart(tool, json.dumps(given)).text


async def main(folder: Path, port: int) -> None:
    async with serving(folder, engine=AgentsEngine()) as server:
        await name_models(server)
        print(server.keys["alice"], flush=True)
        await make_server(server.app, port).serve()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
