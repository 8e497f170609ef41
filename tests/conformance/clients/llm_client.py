"""`llm`, the command line front end: the model is named in its configuration, and asked from the shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, SCHEMA, URL, decided, run, said

_FUNCTION = 'def weather(city: str) -> str:\n    "Tells the weather."\n    return "It is sunny in " + city'


def _llm(*arguments: str) -> str:
    about = {"model_id": "fledge", "model_name": MODEL, "api_base": URL, "api_key_name": "openai"}
    about |= {"supports_schema": True, "supports_tools": True}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps([about]), encoding="utf-8")  # JSON is YAML
        environment = {**os.environ, "LLM_USER_PATH": folder}
        command = [str(Path(sys.executable).with_name("llm")), "-m", "fledge", *arguments]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False, input="")
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout.strip()


def a_prompt() -> None:
    said(_llm("Hello", "--no-stream", "-s", "Be kind."))


def a_stream() -> None:
    said(_llm("Hello"))


def a_schema() -> None:
    decided(json.loads(_llm("Tea or rain?", "--schema", json.dumps(SCHEMA))))


def a_tool() -> None:
    said(_llm("How is the weather in Paris?", "--functions", _FUNCTION, "--chain-limit", "3"))


if __name__ == "__main__":
    run(globals())
