"""`make conformance`: schemathesis against the server, by our own OpenAPI document with every check, and by the
published one, cut down to the operations that are served, for failures, ignored keys and answers that break its schema.

    python tests/conformance/schemas.py [--published FILE] [--seconds N] [--seed N]

The published document is the reader's to give (by default the copy beside the checkout, if there is one); without it
that part is left out and said so. Its statuses are not checked: it lists 200 and little else. The requests follow from
the seed; how many of them are made, from the time. `make schemas` takes more of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from run import HERE, ROOT, environment, serving

PUBLISHED = ROOT.parent / "shared" / "data" / "openai-openapi.json"
KEY = "My API Key"  # seeds.py
METHODS = {"get", "put", "post", "delete", "patch"}
CHECKS = "not_a_server_error,ignored_auth,response_schema_conformance"
PAGE = ROOT / "docs" / "conformance.md"
MARK = "## Against the OpenAPI documents"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--published", type=Path, default=PUBLISHED, help="the published OpenAPI document")
    parser.add_argument("--seconds", type=int, default=60, help="for each document (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=10, help="of each operation, at most (default: %(default)s)")
    args = parser.parse_args()
    cache = Path(os.environ.get("FLEDGE_HOME") or Path.home() / ".cache" / "fledge") / "conformance"
    python = environment(cache, "requirements-schemas.txt", "schemas-venv")
    rows = []
    with tempfile.TemporaryDirectory() as name, serving(Path(name)) as variables:
        base = variables["TEST_API_BASE_URL"]
        ours = json.loads(urllib.request.urlopen(base.removesuffix("/v1") + "/openapi.json").read())
        documents = [("our own", base.removesuffix("/v1"), ours, "all", "coverage,fuzzing,stateful")]
        if args.published.is_file():
            published = cut_down(json.loads(args.published.read_text(encoding="utf-8")), ours)
            documents.append(("the published one", base, published, CHECKS, "coverage,fuzzing"))
        else:
            print(f"the published document is not at {args.published}: that part is left out")
        for title, url, document, checks, phases in documents:
            path = Path(name) / "document.json"
            path.write_text(json.dumps(document), encoding="utf-8")
            command = [str(python.with_name("schemathesis")), "--config-file", str(HERE / "schemathesis.toml")]
            command += ["run", str(path), "--url", url, "--header", f"Authorization: Bearer {KEY}"]
            command += ["--checks", checks, "--phases", phases, "--max-examples", str(args.examples)]
            command += ["--seed", str(args.seed), "--max-time", str(args.seconds), "--continue-on-failure"]
            command += ["--suppress-health-check", "all", "--warnings", "off", "--generation-database", "none"]
            command += ["--request-timeout", "60"]  # of a machine that has other work too
            done = subprocess.run(command, cwd=name, text=True, capture_output=True, check=False)
            print(done.stdout[-20_000:], done.stderr[-2000:], sep="\n")
            rows.append((title, num_operations(document), *found(done.stdout), done.returncode))
    write_rows(rows)
    return max(code for *_, code in rows)


def cut_down(published: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The published document with the operations that our own has too, whatever their parameters are called."""
    served = {(shape(path), method) for path, by in ours["paths"].items() for method in by}
    paths: dict[str, Any] = {}
    for path, by in published["paths"].items():
        is_served = {method: (shape(f"/v1{path}"), method) in served for method in by if method in METHODS}
        if any(is_served.values()):
            paths[path] = {key: value for key, value in by.items() if is_served.get(key, True)}
    kept = {**{key: value for key, value in published.items() if "webhooks" not in key}, "paths": paths}
    return mended(without_discriminators(kept))


def mended(document: dict[str, Any]) -> dict[str, Any]:
    """Where the published document contradicts itself, what its other half says: an upload may be for "evals", so a
    file may be; `encoding_format` may be base64, so an embedding may be a text; and an error stands in `error`, as
    `ErrorResponse` has it, for responses too."""
    purpose = document["components"]["schemas"]["OpenAIFile"]["properties"]["purpose"]["enum"]
    uploads = document["components"]["schemas"]["CreateFileRequest"]["properties"]["purpose"]["enum"]
    purpose += [name for name in uploads if name not in purpose]
    vector = document["components"]["schemas"]["Embedding"]["properties"]
    vector["embedding"] = {"anyOf": [vector["embedding"], {"type": "string"}]}
    operations = [by[method] for by in document["paths"].values() for method in by if method in METHODS]
    answers = [one for operation in operations for status, one in operation["responses"].items() if status[0] == "4"]
    for answer in answers:
        schema = answer.get("content", {}).get("application/json", {}).get("schema", {})
        if schema.get("$ref") == "#/components/schemas/Error":
            schema["$ref"] = "#/components/schemas/ErrorResponse"
    return document


def without_discriminators(value: Any) -> Any:
    """The published ones have no mapping, so read to the letter they ask for the schemas' own names as `type`; what
    they are about is said by `oneOf` all the same."""
    if isinstance(value, dict):
        return {
            key: without_discriminators(item)
            for key, item in value.items()
            if not (key == "discriminator" and isinstance(item, dict) and "propertyName" in item)
        }
    return [without_discriminators(item) for item in value] if isinstance(value, list) else value


def shape(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "{}", path)


def num_operations(document: dict[str, Any]) -> int:
    return sum(method in METHODS for by in document["paths"].values() for method in by)


def found(told: str) -> tuple[int, int]:
    """How many requests were made and how many failures found, as the closing lines say."""
    cases, failures = re.search(r"(\d+) generated", told), re.search(r"(\d+) unique failures?", told)
    return int(cases[1]) if cases else 0, int(failures[1]) if failures else 0


def write_rows(rows: list[tuple[str, int, int, int, int]]) -> None:
    """The section of docs/conformance.md below the client's score."""
    before = PAGE.read_text(encoding="utf-8").partition(MARK)[0].rstrip()
    lines = "\n".join(
        f"| {title} | {operations} | {cases:,} | {failures} |" for title, operations, cases, failures, _ in rows
    )
    text = f"""{before}

{MARK}

Requests made up by schemathesis; written by the run. By our own document with every check; by the published one, cut
down to what is served and mended where it contradicts itself (tests/conformance/schemas.py), for failures of the
server, ignored keys, and answers that break its schemas.

| document | operations | requests | failures |
|---|---|---|---|
{lines}
"""
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
