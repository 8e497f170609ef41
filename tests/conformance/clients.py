"""`make clients`: other ecosystems' clients against our server, and the table of what works in docs/clients.md.

    python tests/conformance/clients.py [CLIENT ...]

Each client runs in an environment that is made for it (clients/requirements-*.txt, clients/package.json), fetched when
this runs and never copied; it talks to the fake engine of strangers.py. A check that fails, fails the run. The examples
of docs/clients.md are run with them. To try the checks on a model of your own, set OPENAI_BASE_URL, OPENAI_API_KEY and
CLIENTS_MODEL, and run a file of clients/ in such an environment.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import javascript
from run import HERE, ROOT, await_port, environment, free_port

CLIENTS = HERE / "clients"
PAGE = ROOT / "docs" / "clients.md"
MARK = "## What was run"
TEXT = "Hello, world! 你好"  # what the fake engine says (tests/serve/serve_fakes.py)
NPM = "npm"


@dataclass(frozen=True)
class Client:
    """A file of checks: the environment it runs in, and the packages whose versions the table shows. `word` is what an
    example of the page imports."""

    title: str
    file: str
    environment: str
    packages: tuple[str, ...]
    word: str | None = None


def _python(title: str, name: str, environment: str, *packages: str, word: str | None = None) -> Client:
    return Client(title, f"{name}_client.py", environment, packages, word)


TABLE = (
    _python("LangChain", "langchain", "openai3", "langchain-openai", "langchain", word="langchain_openai"),
    _python(
        "LlamaIndex",
        "llama_index",
        "openai2",
        "llama-index-llms-openai-like",
        "llama-index-embeddings-openai-like",
        word="llama_index",
    ),
    _python("LM evaluation harness", "lm_eval", "lm-eval", "lm-eval"),
    Client("Vercel AI SDK", "vercel.mjs", NPM, ("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible"), "@ai-sdk/openai"),
    Client("LangChain for JavaScript", "langchain_js.mjs", NPM, ("@langchain/openai",)),
    _python("OpenAI Agents SDK", "agents", "openai3", "openai-agents"),
    _python("Pydantic AI", "pydantic_ai", "openai3", "pydantic-ai-slim"),
    _python("LiteLLM", "litellm", "openai2", "litellm"),
    _python("Instructor", "instructor", "openai2", "instructor"),
    _python("Inspect", "inspect", "openai3", "inspect-ai"),
    _python("DSPy", "dspy", "openai2", "dspy"),
    _python("Haystack", "haystack", "openai3", "haystack-ai"),
    _python("smolagents", "smolagents", "openai3", "smolagents"),
    _python("AutoGen", "autogen", "openai3", "autogen-ext"),
    _python("Agno", "agno", "openai3", "agno"),
    _python("`llm`, a command line", "llm", "openai3", "llm"),
)
Result = tuple[str, str | None]  # a check, and why it failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [client.file.partition(".")[0].removesuffix("_client") for client in TABLE]
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(names)} (default: all)")
    wanted = parser.parse_args().clients
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"no client is called {unknown[0]}; there are {', '.join(names)}")
    cache = Path(os.environ.get("FLEDGE_HOME") or Path.home() / ".cache" / "fledge") / "conformance"
    failures = 0
    with tempfile.TemporaryDirectory() as folder, strangers(Path(folder)) as variables:
        for name, client in zip(names, TABLE, strict=True):
            if wanted and name not in wanted:
                continue
            place = prepared(client.environment, cache)
            if place is None:
                print(f"{client.title} is not tested: node and npm are not here")
                continue
            results = run_client(client, place, {**variables, "HOME": folder})
            write_row(client, versions(client, place), results)
            print(f"{client.title:>28}  {sum(error is None for _, error in results):3d} of {len(results)}", flush=True)
            for check, error in results:
                failures += error is not None
                print("" if error is None else f"  failed: {check}: {error}\n", end="", flush=True)
    return 1 if failures else 0


@contextmanager
def strangers(folder: Path) -> Iterator[dict[str, str]]:
    """The server; gives the variables that the checks and the examples read."""
    port = free_port()
    paths = os.pathsep.join((str(HERE), str(HERE.parent / "serve")))
    command = [sys.executable, str(HERE / "strangers.py"), str(folder / "server"), str(port)]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        key = server.stdout.readline().decode().strip()
        await_port(server, port)
        url = f"http://127.0.0.1:{port}/v1"
        yield {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key, "CLIENTS_MODEL": "pocket", "CLIENTS_TEXT": TEXT}
    finally:
        server.terminate()
        server.wait(30)


def prepared(name: str, cache: Path) -> Path | None:
    """The folder of the environment, made if need be; None without node where that is needed."""
    if name == NPM:
        return javascript.modules(installs=True, package=CLIENTS / "package.json", name="clients-npm")
    uv = environment(cache, "clients/requirements-uv.txt", "uv-venv").with_name("uv")
    place, wanted = cache / f"clients-{name}", CLIENTS / f"requirements-{name}.txt"
    mark = place / wanted.name
    if not (mark.is_file() and mark.read_text(encoding="utf-8") == wanted.read_text(encoding="utf-8")):
        subprocess.run([str(uv), "venv", "--quiet", "--clear", "--python", sys.executable, str(place)], check=True)
        python = str(place / "bin" / "python")
        subprocess.run([str(uv), "pip", "install", "--quiet", "--python", python, "-r", str(wanted)], check=True)
        shutil.copyfile(wanted, mark)
    return place


def run_client(client: Client, place: Path, variables: dict[str, str]) -> list[Result]:
    """Its checks and its examples, each with the reason of its failure."""
    done = execute(client, place, CLIENTS / client.file, variables)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]  # others print, too
    results = [(line["check"], line["error"]) for line in told]
    if done.returncode or not results:
        results.append(("all checks", f"ended with {done.returncode}: {done.stderr.strip()[-500:]}"))
    print(done.stderr if any(error for _, error in results) else "", end="", file=sys.stderr)
    for code in examples(client):
        shown = execute(client, place, code, variables)
        results.append(("the example below", None if shown.returncode == 0 else shown.stderr.strip()[-500:]))
    return results


def execute(
    client: Client, place: Path, code: Path | str, variables: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a file, or a text, in the client's environment. Modules are found from where a script lies, so those for
    node are brought there."""
    suffix = ".mjs" if client.environment == NPM else ".py"
    folder = place if client.environment == NPM else Path(variables["HOME"])
    for file in CLIENTS.glob(f"*{suffix}"):
        shutil.copyfile(file, folder / file.name)
    path = folder / (code.name if isinstance(code, Path) else f"example{suffix}")
    if isinstance(code, str):
        path.write_text(code, encoding="utf-8")
    command = ["node" if client.environment == NPM else str(place / "bin" / "python"), str(path)]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, text=True, capture_output=True, check=False, timeout=600
    )


def examples(client: Client) -> list[str]:
    """The page's code that imports this client."""
    blocks = re.findall(r"^```(?:python|javascript)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.M)
    return [block for block in blocks if client.word is not None and client.word in block]


def versions(client: Client, place: Path) -> list[str]:
    """What is installed, as NAME VERSION."""
    if client.environment == NPM:
        files = [place / "node_modules" / package / "package.json" for package in client.packages]
        found = [json.loads(file.read_text(encoding="utf-8"))["version"] for file in files]
    else:
        code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
        command = [str(place / "bin" / "python"), "-c", code, *client.packages]
        found = subprocess.run(command, text=True, capture_output=True, check=True).stdout.split()
    return [f"{package} {version}" for package, version in zip(client.packages, found, strict=True)]


def write_row(client: Client, shown: Sequence[str], results: Sequence[Result]) -> None:
    """The client's row in the table of docs/clients.md, behind what is written there by hand; other rows stay."""
    before, _, table = PAGE.read_text(encoding="utf-8").partition(MARK)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")}
    failed = [check for check, error in results if error is not None]
    result = f"{len(results) - len(failed)} of {len(results)}" + (f"; not {', '.join(failed)}" if failed else "")
    rows[client.title] = f"| {client.title} | {', '.join(shown)} | {', '.join(c for c, _ in results)} | {result} |"
    lines = "\n".join(rows[title] for title in (client.title for client in TABLE) if title in rows)
    PAGE.write_text(
        f"""{before.rstrip()}

{MARK}

Written by `make clients`, never by hand: the checks are in tests/conformance/clients, the server's engine is a fake
that calls tools and answers in the form it is held to.

| client | version | what was run | passed |
|---|---|---|---|
{lines}
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    sys.exit(main())
