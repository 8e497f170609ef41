"""What happens to every request before and after its route: a name, limits on what is read, headers, a line in the log.

Plain ASGI and outermost, so that it sees what the routes answer and what escapes them. The log holds no prompt, no
answer and no key.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fledge.serve.auth import Keys, authenticate
from fledge.serve.errors import ApiError, api_error, error_response, refused
from fledge.serve.limits import Attempts
from fledge.serve.metrics import Metrics

log = logging.getLogger("fledge.access")

API_VERSION = "2020-10-01"  # what the published API says in `openai-version`
# Possessive and without a need for the closing quote: one that never matched would be tried from each of its quotes,
# which takes quadratic time.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_UPLOAD = "/v1/files"  # the only path that reads a form
# What a method is counted as; others would be names without number, made up by whoever asks.
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_THREAD_BYTES = 1 << 16  # a larger body is looked through in a thread


@dataclass(frozen=True)
class Limits:
    """What is read of one request. JSON bodies are held in memory; uploads go to the disk as they come."""

    max_json_bytes: int = 16 << 20
    max_upload_bytes: int = 512 << 20
    max_json_depth: int = 128
    max_wrong_keys: int = 60  # a minute, from one address


@dataclass
class Visit:
    """One request while it is answered. `notes` are headers that its route wants sent."""

    request_id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    notes: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    status: int | None = None
    is_too_large: bool = False


class Guard:
    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, keys: Keys) -> None:
        self._app, self._limits, self._metrics, self._keys = app, limits, metrics, keys
        self._attempts = Attempts(limits.max_wrong_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit()
        scope.setdefault("state", {})["notes"] = visit.notes
        scope["state"]["request_id"] = visit.request_id

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message["headers"] = [*message["headers"], *_headers(visit)]
            await send(message)

        try:
            await self._answer(scope, receive, send_on, visit)
        except Exception as error:
            if visit.status is not None:
                raise  # the answer has begun; the server cuts the connection
            await error_response(api_error(error))(scope, receive, send_on)
        finally:
            self._record(scope, visit)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, visit: Visit) -> None:
        if b"%00" in scope.get("raw_path", b"") or "\0" in scope["path"] or b"%00" in scope["query_string"]:
            raise refused("The URL holds a NUL character", code="invalid_url")
        # Before anything is read: nobody without a key makes the server work.
        # What the server asks of itself (inside.py) comes with its principal.
        if scope["state"].get("principal") is None:
            principal = await authenticate(self._keys, self._attempts, scope, visit.notes)
            if principal is not None:
                scope["state"]["principal"] = principal
        refusal, receive = await self._read(scope, receive)
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> tuple[ApiError | None, Receive]:
        """What is wrong with the body as a whole, if anything, and where it is to be read from."""
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").lower()
        is_upload = kind.startswith(b"multipart/") and scope["path"] == _UPLOAD
        most = self._limits.max_upload_bytes if is_upload else self._limits.max_json_bytes
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 15 or int(length) > most:
            return _too_large(most), receive
        if is_upload:
            return None, _limited(receive, most)
        body = await _read_all(receive, most)
        if body is None:
            return _too_large(most), receive
        complaint = (
            self._complaint(body) if len(body) < _THREAD_BYTES else await asyncio.to_thread(self._complaint, body)
        )
        return complaint, _replay(body, receive)

    def _complaint(self, body: bytes) -> ApiError | None:
        depth, most = nesting(body), self._limits.max_json_depth
        if depth > most:
            return refused(f"The body is nested {depth} levels deep, at most {most} are read", code="too_deep")
        if has_half_characters(body):
            message = "The body holds half a character: an escape from \\ud800 to \\udfff without its other half"
            return refused(message, code="invalid_unicode")
        return None

    def _record(self, scope: Scope, visit: Visit) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        seconds = time.perf_counter() - visit.began
        status = visit.status or 499  # nothing was sent: the client went away
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http(method, route, status, seconds)
        principal = scope["state"].get("principal")
        line = {"request": visit.request_id, "method": scope["method"], "route": route, "status": status}
        line |= {"ms": round(seconds * 1000, 1), "owner": getattr(principal, "owner", None)}
        log.info("%s", json.dumps(line))


def nesting(body: bytes) -> int:
    """How many brackets are open at once in a JSON text, at most; those in strings do not count."""
    if body.count(b"[") + body.count(b"{") <= 16:
        return 16  # not more than that, which is all anyone wants to know
    depth = deepest = 0
    for bracket in _STRING.sub(b"", body).translate(None, _NO_BRACKET):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def has_half_characters(body: bytes) -> bool:
    """Whether a JSON text has a lone surrogate somewhere: no answer and no database could hold such a text."""
    if b"\\ud" not in body and b"\\uD" not in body:
        return False
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):
        return False  # it is no JSON, which whoever reads it says
    return False


def _headers(visit: Visit) -> list[tuple[bytes, bytes]]:
    milliseconds = int((time.perf_counter() - visit.began) * 1000)
    found = {
        "x-request-id": visit.request_id,
        "openai-processing-ms": str(milliseconds),
        "openai-version": API_VERSION,
        "x-content-type-options": "nosniff",
        **visit.notes,
    }
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in found.items()]


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body of the request is larger than {most} bytes", code="request_too_large")


async def _read_all(receive: Receive, most: int) -> bytes | None:
    """The whole body; None if it is larger than `most`, however it was announced."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once and then what really comes: the client's leaving."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _limited(receive: Receive, most: int) -> Receive:
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            # As what the framework lets through where it reads forms.
            raise HTTPException(413, _too_large(most).message)
        return message

    return counted
