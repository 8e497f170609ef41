"""A request from inside the server: it goes through the whole app in the name of a principal who is known already."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Self

from starlette.types import ASGIApp, Message, Scope

from fledge.serve.auth import Principal
from fledge.serve.errors import ApiError


@dataclass(frozen=True)
class Told:
    """An answer; `body` is JSON, read."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: ApiError) -> Self:
        return cls(error.status, error.body, error.headers)


async def ask(app: ASGIApp, principal: Principal, path: str, body: bytes) -> Told:
    """POST JSON. Being cancelled cancels what it asked for, as a client's going does."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
        # guard.py asks for no key where a principal stands; no request from outside can put one there.
        "state": {"principal": principal},
    }
    is_given = False
    said: list[bytes] = []
    start: Message = {}

    async def receive() -> Message:
        nonlocal is_given
        if is_given:
            await asyncio.Event().wait()  # this client does not go away
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            said.append(message.get("body", b""))

    await app(scope, receive, send)
    told = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
    return Told(start["status"], json.loads(b"".join(said)), told)
