"""The input file of a batch: its lines one by one, and what is wrong with them.

Source: openapi 2.3.0, `CreateBatchRequest`, `BatchError`, and the guide to the batch API for the limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LINES, MAX_BYTES = 50_000, 200 << 20
MAX_TOLD = 100  # errors that are listed
MAX_ID = 512
_HALF = re.compile("[\ud800-\udfff]")  # a lone surrogate, which no file can hold


@dataclass(frozen=True)
class Asked:
    """Line `number`, from 0, of the input."""

    number: int
    custom_id: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Checked:
    """What a look through the input found: how many lines, the first one's model, and the errors."""

    total: int
    model: str | None
    errors: tuple[dict[str, Any], ...]


def check(path: Path, endpoint: str) -> Checked:
    """Look through every line; the file has an error of its own if it is empty or too large."""
    errors: list[dict[str, Any]] = []
    if path.stat().st_size > MAX_BYTES:
        return Checked(0, None, (_error("file_too_large", f"a batch has at most {MAX_BYTES >> 20} MiB", None, None),))
    seen: set[str] = set()
    model: str | None = None
    total = 0
    for number, raw in _lines(path):
        total += 1
        if total > MAX_LINES:
            return Checked(
                total, model, (_error("too_many_tasks", f"a batch has at most {MAX_LINES} lines", None, None),)
            )
        found = _parse(number, raw, endpoint)
        if isinstance(found, Asked):
            if found.custom_id in seen:
                found = _error("duplicate_custom_id", "another line has this custom_id", "custom_id", number)
            else:
                seen.add(found.custom_id)
                name = found.body.get("model")
                model = model or (name if isinstance(name, str) else None)
        if not isinstance(found, Asked) and len(errors) < MAX_TOLD:
            errors.append(found)
    if total == 0:
        errors.append(_error("empty_file", "the file has no line", None, None))
    return Checked(total, model, tuple(errors))


def read(path: Path, endpoint: str, *, but: set[int]) -> Iterator[Asked]:
    """The lines of a file that was found good, without those whose numbers are in `but`."""
    for number, raw in _lines(path):
        if number not in but:
            found = _parse(number, raw, endpoint)
            assert isinstance(found, Asked)
            yield found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, counted from 0."""
    number = 0
    with path.open("rb") as file:
        for raw in file:
            if raw.strip():
                yield number, raw
                number += 1


def _parse(number: int, raw: bytes, endpoint: str) -> Asked | dict[str, Any]:
    """The line, or what is wrong with it."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return _error("invalid_json_line", "this line is not valid JSON", None, number)
    if not isinstance(line, dict):
        return _error("invalid_json_line", "this line is no object", None, number)
    custom_id, body = line.get("custom_id"), line.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID or _HALF.search(custom_id):
        return _error("invalid_custom_id", f"custom_id is a text of 1 to {MAX_ID} characters", "custom_id", number)
    if line.get("method") != "POST":
        return _error("invalid_method", "the method is POST", "method", number)
    if line.get("url") != endpoint:
        return _error("mismatched_endpoint", f"the url is the batch's endpoint, {endpoint}", "url", number)
    if not isinstance(body, dict):
        return _error("invalid_body", "the body is an object", "body", number)
    return Asked(number, custom_id, body)


def _error(code: str, message: str, param: str | None, number: int | None) -> dict[str, Any]:
    """Lines are told from 1."""
    return {"code": code, "message": message, "param": param, "line": None if number is None else number + 1}
