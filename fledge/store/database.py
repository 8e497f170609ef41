"""The database of a server: where it is, how it is spoken to, and how an older one becomes today's. Layer 2, no torch.

SQLite in the server's folder by default, in write-ahead mode, with nothing to set up; PostgreSQL by a URL. A unit of
work is one `reading` or `writing` block. In SQLite a writing block takes the write lock at its beginning and waits
for it up to `BUSY_SECONDS`, so that two writers never find out in the middle that they cannot both go on. SQLite lets
whoever tries next have the lock, so that under load one may wait for ever; the writers of one process therefore take
turns in the order they came, and only other processes are waited for by trying.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from fledge.errors import ConfigError, RunError
from fledge.store.tables import Base

BUSY_SECONDS = 10.0
_MIGRATIONS = Path(__file__).parent / "migrations"
_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
}
_MIGRATION_LOCK = 0x666C6564  # PostgreSQL's advisory locks are numbers; this one spells "fled"
_WRITES = {"fledge_writes": True}


def sqlite_url(path: Path) -> str:
    return URL.create("sqlite", database=str(path)).render_as_string()


class Database:
    """One database; `open` it before use and `close` it in the end. To be used within one event loop."""

    def __init__(self, url: str) -> None:
        """`url` is `sqlite:///PATH` or `postgresql://...`; `ConfigError` if it is neither or lacks its driver."""
        self._url = _with_driver(url)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        self._turn = asyncio.Lock()
        try:
            self._engine = _connect(self._url)
        except ModuleNotFoundError as error:
            raise ConfigError(f"PostgreSQL needs psycopg: pip install 'fledge[postgres]' ({error})") from error

    async def open(self) -> None:
        """Bring the tables up to date. `RunError` if the database cannot be reached or is of a newer fledge."""
        if self.is_sqlite and self._url.database:
            Path(self._url.database).parent.mkdir(parents=True, exist_ok=True)
        try:
            async with self._engine.connect() as connection:
                connection = await connection.execution_options(**_WRITES)
                async with connection.begin():
                    await connection.run_sync(_migrate)
        except OperationalError as error:
            shown = self._url.render_as_string(hide_password=True)
            raise RunError(f"the database {shown} cannot be used: {error.orig}; see FLEDGE_DATABASE_URL") from error

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """A session that sees one state of the database; whatever it changes is dropped."""
        async with AsyncSession(self._engine, expire_on_commit=False) as session:
            yield session

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncSession]:
        """A session whose changes come about together, at its end, or not at all. Never one within another."""
        async with self._own_turn(), AsyncSession(self._engine, expire_on_commit=False) as session:
            await session.connection(execution_options=_WRITES)
            yield session
            await session.commit()

    @asynccontextmanager
    async def _own_turn(self) -> AsyncIterator[None]:
        """Of this process's writers to SQLite; `OperationalError` if it does not come in time."""
        if not self.is_sqlite:
            yield
            return
        try:
            async with asyncio.timeout(BUSY_SECONDS):
                await self._turn.acquire()
        except TimeoutError as error:
            raise OperationalError("BEGIN IMMEDIATE", None, error) from error
        try:
            yield
        finally:
            self._turn.release()

    async def close(self) -> None:
        await self._engine.dispose()


def _with_driver(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError("the database's URL cannot be read; write sqlite:///PATH or postgresql://...") from None
    name = parsed.get_backend_name() if parsed.drivername not in _DRIVERS else parsed.drivername
    if name not in _DRIVERS:
        raise ConfigError(
            f"the database is '{name}'; known are SQLite (sqlite:///PATH) and PostgreSQL (postgresql://...)"
        )
    return parsed.set(drivername=_DRIVERS[name])


def _connect(url: URL) -> AsyncEngine:
    if url.get_backend_name() != "sqlite":
        return create_async_engine(url, pool_size=10, max_overflow=20, pool_pre_ping=True)
    engine = create_async_engine(url, connect_args={"timeout": BUSY_SECONDS}, json_serializer=_to_json)
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _to_json(value: Any) -> str:
    """With its characters as they are: SQLite does not find a key that is written with escapes. Half characters (lone
    surrogates) cannot be written otherwise."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _prepare_sqlite(connection: Any, _: object) -> None:
    """Write-ahead: readers and the writer do not wait for each other. A power cut may lose the last commits of a
    `synchronous=NORMAL` database and never damages it."""
    connection.isolation_level = None  # the driver begins nothing by itself; `_begin_sqlite` does
    cursor = connection.cursor()
    _write_ahead(cursor)
    for pragma in ("synchronous=NORMAL", "foreign_keys=ON", "journal_size_limit=67108864"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _write_ahead(cursor: Any) -> None:
    """SQLite does not wait for its turn to change a new file's journal: two that open it at once must try again."""
    last = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > last:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("fledge_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(connection: Connection) -> None:
    """Run the migrations that are due; several servers that start at once do it one after the other."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
    scripts = ScriptDirectory(str(_MIGRATIONS), version_locations=[str(_MIGRATIONS)])

    def steps(revision: Any, _: object) -> Any:
        known = {script.revision for script in scripts.walk_revisions()}
        have = {revision} if isinstance(revision, str) else set(revision or ())
        if not have <= known:
            raise RunError("the database is of a newer fledge; upgrade this one, or name another database")
        return scripts._upgrade_revs("head", revision)

    # Alembic's commands would need an env.py, which acts when it is imported; this is what one would do.
    with EnvironmentContext(Config(), scripts, fn=steps) as environment:
        environment.configure(connection=connection, target_metadata=Base.metadata)
        environment.run_migrations()
