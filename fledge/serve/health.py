"""/health, for whoever asks, and /metrics, for Prometheus."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from fledge.errors import EngineError
from fledge.serve.auth import Principal, needs
from fledge.serve.sse import json_response
from fledge.serve.state import state_of

router = APIRouter(tags=["server"])


@router.get("/health")
async def health(request: Request) -> Response:
    """200 if what is loaded can answer, 503 if an engine is being started again."""
    is_ready = state_of(request).hub.is_ready
    return json_response({"status": "ok" if is_ready else "starting"}, 200 if is_ready else 503)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request, _: Annotated[Principal, Depends(needs("metrics"))]) -> Response:
    state = state_of(request)
    state.metrics.forget_engines()
    for model in state.hub.loaded():
        try:
            state.metrics.engine(model.name, await model.engine.stats())
        except EngineError:
            continue  # it is being started again and has no figures
    return Response(state.metrics.text(), media_type=CONTENT_TYPE_LATEST)
