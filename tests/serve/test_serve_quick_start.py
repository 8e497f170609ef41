"""The examples of docs/quick-start.md, run as they stand against a server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from speaking import speaking

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
sys.path.append(str(ROOT / "tests" / "conformance"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with speaking(tmp_path_factory.mktemp("server")) as (url, key):
        yield {**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": key}


def run(command: list[str], variables: dict[str, str], folder: Path) -> str:
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(4))
def test_curl(number: int, variables: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not here")
    said = run(["bash", "-euc", blocks("bash")[number]], variables, tmp_path)
    expected = ("Hello, world!", "data: [DONE]", "sure", '"status":"validating"')
    assert expected[number] in said, said


@pytest.mark.parametrize("number", range(4))
def test_python(number: int, variables: dict[str, str], tmp_path: Path) -> None:
    said = run([sys.executable, "-c", blocks("python")[number]], variables, tmp_path)
    expected = ("Hello, world!", "weather Paris", "tea", "validating_files")
    assert expected[number] in said, said


@pytest.mark.parametrize("number", range(2))
def test_javascript(number: int, variables: dict[str, str]) -> None:
    from javascript import modules

    folder = modules(installs=False)
    if folder is None:
        pytest.skip("node or the npm client is not here; `make conformance` installs it")
    name = f"quick-start-{number}.mjs"
    (folder / name).write_text(blocks("javascript")[number], encoding="utf-8")
    said = run(["node", name], variables, folder)
    expected = ("Hello, world!", "Paris\ntea")
    assert expected[number] in said, said


def test_every_example_is_run() -> None:
    assert [len(blocks(language)) for language in ("bash", "python", "javascript")] == [4, 4, 2]
