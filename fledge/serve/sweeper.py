"""What a server throws away by itself: files whose time is over, and what uploads that a crash cut short have left."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from sqlalchemy.exc import SQLAlchemyError

from fledge.store.blobs import Blobs
from fledge.store.database import Database
from fledge.store.files import sweep_expired

log = logging.getLogger(__name__)

EVERY_SECONDS = 60.0
ABANDONED_SECONDS = 24 * 3600  # no upload takes so long


class Sweeper:
    """Sweeps at once when it is opened, and then every `every` seconds until it is closed."""

    def __init__(self, database: Database, blobs: Blobs, every: float = EVERY_SECONDS) -> None:
        self._database, self._blobs, self._every = database, blobs, every
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()

    def open(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Ends between two sweeps: what the database is in the middle of is let end."""
        self._stop.set()
        if self._task is not None:
            await self._task

    async def sweep(self) -> int:
        """How many files were deleted."""
        await asyncio.to_thread(self._blobs.sweep_abandoned, ABANDONED_SECONDS)
        return await sweep_expired(self._database, self._blobs)

    async def _run(self) -> None:
        while not self._stop.is_set():
            try:
                num_swept = await self.sweep()
                if num_swept:
                    log.info("%d files have expired and are deleted", num_swept)
            except (SQLAlchemyError, OSError) as error:
                log.error("expired files are not deleted yet: %s", error)  # tried again
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await self._stop.wait()
