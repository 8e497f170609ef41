"""`make conformance`: the API tests of OpenAI's own clients against our server, and the score.

The tests of the Python client come from its source package, fetched when this runs and never copied. They run in an
environment of their own (requirements.txt), one after the other, and the database is restored before each.

    python tests/conformance/run.py [--sdist FOLDER] [RESOURCE ...]

What cannot pass honestly stands in `REASONS`; a test that fails without a reason fails the run. Then the npm client's
turn comes (javascript.py).
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import javascript

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MARK, MARK_END = "<!-- conformance -->", "<!-- /conformance -->"
SCOPE = {
    "models": "test_models.py",
    "embeddings": "test_embeddings.py",
    "moderations": "test_moderations.py",
    "completions": "test_completions.py",
    "chat": "chat/test_completions.py",
    "chat messages": "chat/completions/test_messages.py",
    "files": "test_files.py",
    "fine-tuning jobs": "fine_tuning/test_jobs.py",
    "fine-tuning checkpoints": "fine_tuning/jobs/test_checkpoints.py",
    "fine-tuning permissions": "fine_tuning/checkpoints/test_permissions.py",
    "graders": "fine_tuning/alpha/test_graders.py",
    "batches": "test_batches.py",
    "responses": "test_responses.py",
    "response items": "responses/test_input_items.py",
    "response tokens": "responses/test_input_tokens.py",
    "conversations": "test_conversations.py",
    "conversation items": "conversations/test_items.py",
}

# Why a test cannot pass honestly, by resource and the beginning of its name.
REASONS = {
    (
        "embeddings",
        "test_",
    ): "the client asks for base64, is given it, and its strict mode wants numbers before decoding",
    ("files", "test_"): "left out by the client's own tests: its mock of a file's content does not know aiohttp",
    ("responses", "test_method_create_with_all_params"): "asks with `conversation` and `previous_response_id` at once, "
    "which the published document forbids, and with a stored prompt",
    ("responses", "test_method_compact_with_all_params"): "the published output begins with the user's messages, which "
    "the client's own type for it does not hold",
    ("response tokens", "test_method_count_with_all_params"): "asks with `conversation` and `previous_response_id` at "
    "once, which the published document forbids",
}


def reason_of(failure: str) -> str | None:
    """Why a test, as RESOURCE: NAME, cannot pass; None if it should."""
    resource, _, name = failure.partition(": ")
    found = [why for (of, start), why in REASONS.items() if of == resource and name.startswith(start)]
    return found[0] if found else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sdist", type=Path, help="the unpacked source package, if it is there already")
    parser.add_argument("resources", nargs="*", help=f"of {', '.join(SCOPE)} (default: all)")
    args = parser.parse_args()
    cache = Path(os.environ.get("FLEDGE_HOME") or Path.home() / ".cache" / "fledge") / "conformance"
    python = environment(cache)
    source = args.sdist or fetch(python, cache)
    chosen = {name: path for name, path in SCOPE.items() if not args.resources or name in args.resources}
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as variables:
        passed, total, failures = run_tests(python, source, chosen, variables, Path(folder) / "report.xml")
    for name in chosen:
        print(f"{name:>24}  {passed[name]:4d} of {total[name]}")
    print(f"{'all':>24}  {passed.total():4d} of {total.total()}")
    unexplained = [failure for failure in failures if reason_of(failure) is None]
    for failure in unexplained:
        print(f"  failed: {failure}")
    if args.resources:
        return 1 if unexplained else 0
    write_score(passed, total, failures)
    return javascript.main() or (1 if unexplained else 0)


def environment(cache: Path, requirements: str = "requirements.txt", name: str = "venv") -> Path:
    """The interpreter of an environment, made if need be."""
    wanted = (HERE / requirements).read_text(encoding="utf-8")
    python, mark = cache / name / "bin" / "python", cache / name / "requirements.txt"
    if not (mark.is_file() and mark.read_text(encoding="utf-8") == wanted):
        subprocess.run([sys.executable, "-m", "venv", str(cache / name)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]
        subprocess.run([*install, str(HERE / requirements)], check=True)
        mark.write_text(wanted, encoding="utf-8")
    return python


def fetch(python: Path, cache: Path) -> Path:
    """The unpacked source package of the version that is pinned."""
    pinned = re.search(r"openai\S*==(\S+)", (HERE / "requirements.txt").read_text(encoding="utf-8"))
    assert pinned is not None
    folder = cache / f"openai-{pinned[1]}"
    if not (folder / "tests").is_dir():
        command = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", f"openai=={pinned[1]}", "-d", str(cache)]
        subprocess.run(command, check=True)
        with tarfile.open(cache / f"openai-{pinned[1]}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
    return folder


@contextmanager
def serving(folder: Path) -> Iterator[dict[str, str]]:
    """The seeded server; gives the variables that the tests need."""
    port, control_port = free_port(), free_port()
    command = [sys.executable, str(HERE / "server.py"), str(folder), str(port), str(control_port)]
    paths = os.pathsep.join((str(HERE), str(HERE.parent / "serve")))
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    try:
        await_port(server, port)
        yield {"TEST_API_BASE_URL": f"http://127.0.0.1:{port}/v1", "FLEDGE_CONTROL_PORT": str(control_port)}
    finally:
        server.terminate()
        server.wait(30)


def await_port(server: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(3000):
        if server.poll() is not None:
            raise SystemExit("the server did not start")
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit("the server did not start in five minutes")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def run_tests(
    python: Path, source: Path, chosen: dict[str, str], variables: dict[str, str], report: Path
) -> tuple[Counter[str], Counter[str], list[str]]:
    """Passed and total by resource, and the failures by name."""
    files = [f"tests/api_resources/{path}" for path in chosen.values()]
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "fledge_restore",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
    ]
    command += ["--tb=line", f"--junitxml={report}", *files]
    paths = {"PYTHONPATH": f"{HERE}{os.pathsep}{source / 'src'}", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, cwd=source, env={**os.environ, **variables, **paths}, check=False)
    passed: Counter[str] = Counter(dict.fromkeys(chosen, 0))
    total: Counter[str] = Counter(dict.fromkeys(chosen, 0))
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        place = case.get("classname", "").removeprefix("tests.api_resources.").rpartition(".")[0]
        name = next(name for name, path in chosen.items() if path.removesuffix(".py").replace("/", ".") == place)
        total[name] += 1
        is_bad = case.find("failure") is not None or case.find("error") is not None or case.find("skipped") is not None
        passed[name] += not is_bad
        if is_bad:
            failures.append(f"{name}: {case.get('name')}")
    return passed, total, failures


def write_score(passed: Counter[str], total: Counter[str], failures: list[str]) -> None:
    """docs/conformance.md, and the score in the READMEs between their marks."""
    rows = "\n".join(f"| {name} | {passed[name]} | {total[name]} |" for name in total)
    reasons = Counter((failure.partition(": ")[0], reason_of(failure) or "not known yet") for failure in failures)
    why = "\n".join(f"| {name} | {count} | {reason} |" for (name, reason), count in reasons.items())
    text = f"""# Conformance

The API tests of OpenAI's own Python client against our server; written by `make conformance`, never by hand. The same
command runs the npm client's streaming, tools and parsing (tests/conformance/npm).

| resource | passed | of |
|---|---|---|
{rows}
| **all** | **{passed.total()}** | **{total.total()}** |

## What does not pass, and why

| resource | tests | why |
|---|---|---|
{why}
"""
    page = ROOT / "docs" / "conformance.md"
    _, mark, rest = page.read_text(encoding="utf-8").partition("\n## Against ")  # what schemas.py has written
    page.write_text(text + mark + rest, encoding="utf-8")
    for name in ("README.md", "README.zh-CN.md"):
        readme = ROOT / name
        old = readme.read_text(encoding="utf-8")
        score = f"{MARK}**{passed.total()} / {total.total()}**{MARK_END}"
        new = re.sub(re.escape(MARK) + ".*?" + re.escape(MARK_END), lambda _, score=score: score, old, flags=re.DOTALL)
        readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
