from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from databases import postgres
from sqlalchemy import delete

from fledge.store.database import Database, sqlite_url
from fledge.store.tables import Base


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    """An empty database of either kind."""
    is_sqlite = request.param == "sqlite"
    opened = Database(sqlite_url(tmp_path / "a.db") if is_sqlite else request.getfixturevalue("postgres_url"))
    await opened.open()
    if not is_sqlite:
        async with opened.writing() as session:
            for table in reversed(Base.metadata.sorted_tables):
                await session.execute(delete(table))
    yield opened
    await opened.close()
