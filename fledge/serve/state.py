"""What a running server consists of, in one value that every route gets. Made by app.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from fastapi import Request

from fledge.rl.judge import Judge
from fledge.safety.guard import GuardConfig, SafetyGuard
from fledge.serve.auth import Keys
from fledge.serve.guard import Limits
from fledge.serve.hub import Hub
from fledge.serve.jobs import Jobs
from fledge.serve.metrics import Metrics
from fledge.serve.moderation import Moderator
from fledge.store.blobs import Blobs
from fledge.store.database import Database


@dataclass(frozen=True)
class ServerConfig:
    """`max_answers` bounds n, best_of and the number of prompts of one request together, `max_tokens` one answer.

    `drain_seconds` is what answers in progress are given when the server is told to end. `guard` says what is moderated
    in-line; without a moderation model that is nothing.
    """

    limits: Limits = field(default_factory=Limits)
    max_running: int = 1024
    max_answers: int = 128
    max_tokens: int = 1 << 20
    drain_seconds: float = 30.0
    guard: GuardConfig = field(default_factory=GuardConfig)


@dataclass(frozen=True)
class State:
    config: ServerConfig
    database: Database
    blobs: Blobs
    hub: Hub
    jobs: Jobs
    keys: Keys
    metrics: Metrics
    guard: SafetyGuard
    judge: Judge
    moderator: Moderator | None = None


def state_of(request: Request) -> State:
    return cast(State, request.app.state.fledge)
