"""The server as an ASGI app: its parts put together, opened and closed. Begin here to read this folder.

guard.py sees every request first; auth.py says whose it is; a router file a resource answers it, most by a job
(jobs.py) over the engine's events (generation.py).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

import fledge
from fledge.errors import ConfigError
from fledge.rl.judge import Judge
from fledge.safety.guard import SafetyGuard
from fledge.serve import (
    batches,
    chat,
    compaction,
    completions,
    conversations,
    embeddings,
    errors,
    files,
    graders,
    health,
    jobs_api,
    models,
    moderations,
    rerank,
    responses,
    responses_stored,
    stored,
    tokens,
    tuning,
    tuning_shared,
)
from fledge.serve.auth import Keys
from fledge.serve.batches_run import Batches
from fledge.serve.document import document
from fledge.serve.guard import Guard
from fledge.serve.hub import Hub, Loader, ModelEntry
from fledge.serve.jobs import Jobs
from fledge.serve.limits import Limiter
from fledge.serve.metrics import Metrics
from fledge.serve.moderation import Moderator
from fledge.serve.state import ServerConfig, State
from fledge.serve.sweeper import Sweeper
from fledge.serve.wire import ErrorAnswer
from fledge.store.blobs import Blobs
from fledge.store.database import Database
from fledge.text import constitution

log = logging.getLogger(__name__)

# Of two paths that fit, the one that comes first wins; so what is named comes before what is a parameter.
_RESOURCES = (
    chat,
    stored,
    responses,
    compaction,
    responses_stored,
    conversations,
    completions,
    embeddings,
    rerank,
    moderations,
    models,
    files,
    batches,
    tuning,
    tuning_shared,
    graders,
    tokens,
    jobs_api,
    health,
)
GRADER_WORKERS = 2  # processes, at most, that try graders; a job's graders run in its worker
ROUTERS = tuple(resource.router for resource in _RESOURCES)


def make_state(
    config: ServerConfig,
    database: Database,
    blobs: Blobs,
    loader: Loader,
    own: Sequence[ModelEntry],
    max_bytes: int | None = None,
    moderator: Moderator | None = None,
) -> State:
    """The parts of a server. `own` are its models; together they may take `max_bytes` of memory.

    `ConfigError` if something is to be moderated in-line and there is no moderator.
    """
    if moderator is None and "block" in (config.guard.input, config.guard.output):
        raise ConfigError("moderation in-line needs a moderation model; make one: fledge moderation train RUN")
    return State(
        config=config,
        database=database,
        blobs=blobs,
        hub=Hub(database, loader, own, max_bytes),
        jobs=Jobs(database, config.max_running),
        keys=Keys(database, Limiter()),
        metrics=Metrics(),
        judge=Judge(GRADER_WORKERS),
        guard=SafetyGuard(constitution.load()),
        moderator=moderator,
    )


def make_app(state: State) -> FastAPI:
    """The app over these parts, whose database is open. Its lifespan opens and closes the rest."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await state.jobs.open()
        runner = Batches(state, app)
        sweeper = Sweeper(state.database, state.blobs)
        runner.open()
        sweeper.open()
        try:
            yield
        finally:
            await runner.close()
            await sweeper.close()
            await state.jobs.close(state.config.drain_seconds)
            await state.hub.close()
            state.judge.close()
            if state.moderator is not None:
                await state.moderator.close()

    app = FastAPI(
        title="fledge",
        version=fledge.__version__,
        lifespan=lifespan,
        responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.fledge = state
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    errors.install(app, ROUTERS)
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(Guard, limits=state.config.limits, metrics=state.metrics, keys=state.keys)
    return app
