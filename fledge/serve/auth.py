"""Who asks: a bearer key becomes a `Principal`, or the request ends with 401 or 403.

guard.py asks before it reads a body, whatever the path; the paths that need no key are listed in `PUBLIC`, which a test
holds against the app.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Request
from starlette.types import Scope

from fledge.serve.errors import ApiError
from fledge.serve.limits import Attempts, Budgets, Limiter
from fledge.store.database import Database
from fledge.store.keys import find_key, find_key_by_id, hash_key
from fledge.store.tables import KeyRow

PUBLIC = frozenset({"/health", "/openapi.json"})
MAX_KEY_LENGTH = 512
# A key that was revoked by another process is refused after this time at the latest.
_TRUST_SECONDS = 2.0
_MAX_KNOWN = 10_000


@dataclass(frozen=True)
class Principal:
    """The owner of what a request makes and sees, and what its key allows."""

    owner: str
    key_id: str
    scopes: frozenset[str]
    budgets: Budgets

    def may(self, scope: str) -> bool:
        return bool(self.scopes & {"all", scope})


class Keys:
    """Finds principals by their keys, and remembers them for a moment."""

    def __init__(self, database: Database, limiter: Limiter) -> None:
        self._database, self._limiter = database, limiter
        self._known: dict[str, tuple[float, Principal]] = {}  # by the key's hash

    async def principal(self, key: str) -> Principal | None:
        digest = hash_key(key)
        until, known = self._known.get(digest, (0.0, None))
        if known is not None and time.monotonic() < until:
            return known
        row = await find_key(self._database, key)
        if row is None:
            self._known.pop(digest, None)
            return None
        found = self._of(row)
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[digest] = time.monotonic() + _TRUST_SECONDS, found
        return found

    async def holder(self, key_id: str) -> Principal | None:
        """Whoever holds the key of this id, if it is in force; for what goes on without a request (batches)."""
        row = await find_key_by_id(self._database, key_id)
        return None if row is None else self._of(row)

    def _of(self, row: KeyRow) -> Principal:
        budgets = self._limiter.budgets(row.id, row.requests_per_minute, row.tokens_per_minute)
        return Principal(row.owner, row.id, frozenset(row.scopes), budgets)


def bearer_of(given: str | None) -> str:
    """The key in an Authorization header; 401 without one."""
    if given is None:
        raise _unauthorized("You did not provide an API key: send the header Authorization: Bearer YOUR_KEY")
    scheme, _, key = given.partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key or len(key) > MAX_KEY_LENGTH:
        raise _unauthorized("The Authorization header must be: Bearer YOUR_KEY")
    return key


async def authenticate(keys: Keys, attempts: Attempts, scope: Scope, notes: dict[str, str]) -> Principal | None:
    """Who asks, by the Authorization header; None on a public path. 401, or 429 when the key's requests are used up or
    too many wrong keys came from the same address.

    `notes` are headers for the answer, whatever it will be.
    """
    if scope["path"] in PUBLIC:
        return None
    given = dict(scope["headers"]).get(b"authorization")
    principal = await keys.principal(bearer_of(None if given is None else given.decode("latin-1")))
    if principal is None:
        attempts.failed((scope.get("client") or ("unknown",))[0])
        raise _unauthorized("Incorrect API key provided", "invalid_api_key")
    try:
        principal.budgets.charge("requests", 1)
    finally:
        notes.update(principal.budgets.headers())
    return principal


def needs(scope: str) -> Callable[[Request], Awaitable[Principal]]:
    """A dependency: the principal, if its key has this scope."""

    async def check(request: Request) -> Principal:
        principal: Principal = request.state.principal
        if not principal.may(scope):
            message = f"This key lacks the scope '{scope}'; make one that has it with `fledge keys create`"
            raise ApiError(403, message, code="missing_scope")
        return principal

    return check


def _unauthorized(message: str, code: str | None = None) -> ApiError:
    headers = {"www-authenticate": "Bearer"}
    return ApiError(401, message, kind="invalid_request_error", code=code, headers=headers)
