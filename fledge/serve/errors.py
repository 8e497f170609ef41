"""Every error as the published API words it: a status, and a body with message, type, param and code.

Sources: openapi 2.3.0 (`Error`), and the client's own mapping of statuses to exceptions (openai 3.51.0).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from fledge.errors import EngineError, UserError
from fledge.store.pages import UnknownCursor

log = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# How pydantic names the members of a union in a place.
_UNION = re.compile(r"(str|int|float|bool|list|dict|constrained-\w+|(list|dict|literal)\[.*|[A-Z]\w+)$")
_encode = msgspec.json.Encoder().encode


class ApiError(Exception):
    """An answer of `status` that says what is wrong; `param` names the field, `code` the kind of error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        inner = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": inner}


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: what the client sent cannot be used."""
    return ApiError(400, message, param=param, code=code)


def not_found(what: str, name: str, param: str | None = None) -> ApiError:
    """404, the same for what is not there and what is somebody else's."""
    message = f"No such {what}: '{name[:200]}'"
    return ApiError(404, message, param=param, kind="invalid_request_error", code="not_found")


def api_error(error: BaseException) -> ApiError:
    """What to tell a client of an error that happened while its request was answered."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownCursor):
        return refused(str(error), "after", "invalid_cursor")
    if isinstance(error, UserError):
        return refused(str(error))
    if isinstance(error, EngineError):
        log.error("the engine failed a request: %s", error)
        headers = {"retry-after": "1"}
        return ApiError(
            503, "The model's engine is not available; try again", code="engine_unavailable", headers=headers
        )
    log.error("a request failed", exc_info=error)
    if isinstance(error, SQLAlchemyError):
        headers = {"retry-after": "1"}
        return ApiError(503, "The database is not available; try again", code="store_unavailable", headers=headers)
    if isinstance(error, OSError):
        return ApiError(503, "The server's disk or network is not available; try again", code="system_unavailable")
    return ApiError(500, "The server had an error while it answered; its log says more", code="internal_error")


def error_response(error: ApiError) -> Response:
    return Response(_encode(error.body), error.status, error.headers, "application/json")


def place_of(location: tuple[Any, ...]) -> str | None:
    """`messages[0].role` for a place in a body, without the parts that say where or as what it was looked for."""
    text = ""
    for part in location[1:]:
        if isinstance(part, str) and _UNION.match(part):
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or None


def from_validation(error: RequestValidationError) -> ApiError:
    """The first complaint; of a union's complaints the one that got furthest."""
    complaints = error.errors()
    first = complaints[0]["loc"][:2]
    found = max((c for c in complaints if c["loc"][:2] == first), key=lambda c: len(c["loc"]))
    param, kind = place_of(found["loc"]), found["type"]
    if param is None and kind != "json_invalid":
        return refused(f"The request needs a body, a JSON object: {found['msg']}", None, "invalid_value")
    if kind == "extra_forbidden":
        return refused(f"Unrecognized request argument supplied: {param}", param, "unknown_parameter")
    if kind == "missing":
        return refused(f"Missing required parameter: '{param}'", param, "missing_required_parameter")
    if kind == "json_invalid":
        return refused("The body of the request is no valid JSON", None, "invalid_json")
    return refused(f"Invalid value for '{param}': {found['msg']}", param, "invalid_value")


def _allowed(routers: Sequence[APIRouter], request: Request) -> str:
    """The methods of all routes that have this path; the framework names those of the first alone. A route of this very
    path hides those with a parameter in its place."""
    every = (route for router in routers for route in router.routes)
    routes = [route for route in every if route.matches(request.scope)[0] is not Match.NONE]
    routes = [route for route in routes if getattr(route, "path", "") == request.scope["path"]] or routes
    return ", ".join(sorted({method for route in routes for method in getattr(route, "methods", None) or ()}))


def install(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Have every error of the app that serves these routers, its validation's included, answered in this form."""

    async def on_api_error(_: Request, error: Exception) -> Response:
        return error_response(api_error(error))

    async def on_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(from_validation(error))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            found = ApiError(404, f"Unknown request URL: {request.method} {request.url.path}", code="unknown_url")
            found.kind = "invalid_request_error"
        elif error.status_code == 405:
            message = f"{request.method} is not allowed here"
            found = ApiError(405, message, code="method_not_allowed", headers={"allow": _allowed(routers, request)})
        else:
            code = "request_too_large" if error.status_code == 413 else None
            found = ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
        return error_response(found)

    for kind in (ApiError, UserError, EngineError, SQLAlchemyError, OSError):
        app.add_exception_handler(kind, on_api_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
