"""API keys: made, listed, found and revoked. Layer 2, no torch.

A key is 256 random bits, so its SHA-256 is as hard to turn back as the key is to guess; a slow password hash would
only slow every request down. The key is shown once, when it is made.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select, update

from fledge.errors import UserError
from fledge.store.database import Database
from fledge.store.pages import new_id, now
from fledge.store.tables import KeyRow

# What a key may be allowed to do. "all" is every scope, those of later versions included.
SCOPES = ("all", "models", "generate", "files", "tuning", "metrics")
PREFIX = "sk-fledge-"


@dataclass(frozen=True)
class KeyRequest:
    """A key to be made. `owner` is who owns what is made with it; None budgets are unlimited."""

    owner: str
    name: str = "default"
    scopes: Sequence[str] = ("all",)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        unknown = [scope for scope in self.scopes if scope not in SCOPES]
        if unknown or not self.scopes:
            raise UserError(f"a key's scopes are among {', '.join(SCOPES)}, got {', '.join(unknown) or 'none'}")
        if not 1 <= len(self.owner) <= 255 or not 1 <= len(self.name) <= 255:
            raise UserError("a key's owner and name have 1 to 255 characters")
        budgets = (self.requests_per_minute, self.tokens_per_minute)
        if any(budget is not None and not 1 <= budget < 2**53 for budget in budgets):
            raise UserError(
                f"a key's budgets a minute are at least 1, got {budgets[0]} requests and {budgets[1]} tokens"
            )


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


async def create_key(database: Database, request: KeyRequest, key: str | None = None) -> tuple[str, KeyRow]:
    """The new key, which nobody can read again, and its row. `key` is one that a user brings along."""
    key = PREFIX + secrets.token_urlsafe(32) if key is None else key
    row = KeyRow(
        id=new_id("key_"),
        created_at=now(),
        owner=request.owner,
        name=request.name,
        hash=hash_key(key),
        hint=key[-4:],
        scopes=list(request.scopes),
        requests_per_minute=request.requests_per_minute,
        tokens_per_minute=request.tokens_per_minute,
    )
    async with database.writing() as session:
        session.add(row)
    return key, row


async def find_key(database: Database, key: str) -> KeyRow | None:
    """The row of a key that is in force."""
    digest = hash_key(key)
    async with database.reading() as session:
        row = await session.scalar(select(KeyRow).where(KeyRow.hash == digest, KeyRow.revoked_at.is_(None)))
    # The index has compared hashes, whose prefixes tell nothing about a key; this comparison takes constant time.
    return row if row is not None and hmac.compare_digest(row.hash, digest) else None


async def find_key_by_id(database: Database, key_id: str) -> KeyRow | None:
    """The row of a key that is in force."""
    async with database.reading() as session:
        return await session.scalar(select(KeyRow).where(KeyRow.id == key_id, KeyRow.revoked_at.is_(None)))


async def list_keys(database: Database) -> Sequence[KeyRow]:
    async with database.reading() as session:
        return (await session.scalars(select(KeyRow).order_by(KeyRow.seq))).all()


async def revoke_key(database: Database, key_id: str) -> bool:
    """Put a key out of force; false if there is none of that id, or it was already."""
    changed = (
        update(KeyRow)
        .where(KeyRow.id == key_id, KeyRow.revoked_at.is_(None))
        .values(revoked_at=now())
        .returning(KeyRow.id)
    )
    async with database.writing() as session:
        return (await session.scalar(changed)) is not None
