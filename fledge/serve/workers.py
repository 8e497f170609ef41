"""The server's own worker: a process that is started when there is a fine-tuning job to run, and started again if it
dies. It ends by itself when there is nothing left to do, and with the server, however that ends.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress

from sqlalchemy.exc import SQLAlchemyError

from fledge.store import tuning
from fledge.store.database import Database

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
FAREWELL_SECONDS = 60.0  # that a job which is told to stop has to save itself


class OwnWorker:
    """`command` starts a worker; it is called with `--name NAME --attached`."""

    def __init__(self, database: Database, command: Sequence[str]) -> None:
        self._database, self._command = database, tuple(command)
        self._process: asyncio.subprocess.Process | None = None
        self._name = ""

    async def run(self) -> None:
        """Until it is cancelled, which ends the worker."""
        try:
            while True:
                try:
                    await self._look()
                except (SQLAlchemyError, OSError) as error:
                    log.error("the worker is not looked after: %s", error)
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            await self._end()

    async def _look(self) -> None:
        if self._process is not None and self._process.returncode is not None:
            if self._process.returncode != 0:
                log.error("the worker has ended with status %d", self._process.returncode)
            # What it left running need not wait for its lease to run out.
            await tuning.release_jobs(self._database, self._name)
            self._process = None
        if self._process is None and await tuning.has_work(self._database):
            self._name = f"own-{secrets.token_hex(8)}"
            command = (*self._command, "--name", self._name, "--attached")
            self._process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
            log.info("worker %s is started", self._name)

    async def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
