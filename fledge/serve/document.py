"""Our own OpenAPI document, with what the framework does not know of: that every path needs a key but the public ones,
and which answers may be streams.

The keys are asked for before routing (guard.py), so no route declares them.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from fledge.serve.auth import PUBLIC

# Of each event of a stream; its data is JSON, or "[DONE]" at the end of a chat's.
_TEXT = {"type": "string"}
_EVENT = {"type": "object", "properties": {"event": _TEXT, "data": _TEXT, "id": _TEXT}}
_SCHEME = {"type": "http", "scheme": "bearer", "description": "a key made by `fledge keys create`"}

# With `stream` these answer with server-sent events (sse.py).
STREAMS = (
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/v1/responses"),
    ("get", "/v1/responses/{response_id}"),
    ("get", "/v1/jobs/{job_id}/events"),
)


def document(app: FastAPI) -> dict[str, Any]:
    """The framework's document and the keys; made once, and then remembered by the app."""
    if app.openapi_schema is None:
        made = FastAPI.openapi(app)
        made.setdefault("components", {})["securitySchemes"] = {"bearer": _SCHEME}
        made["security"] = [{"bearer": []}]
        for path in PUBLIC & set(made["paths"]):
            for operation in made["paths"][path].values():
                operation["security"] = []
        for method, path in STREAMS:
            content = made["paths"][path][method]["responses"]["200"].setdefault("content", {})
            content["text/event-stream"] = {"schema": _EVENT}
        app.openapi_schema = made
    return app.openapi_schema
