"""Ctrl-C and SIGTERM during long work: stop at the next safe place, or at once where there is nothing to save."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from fledge.errors import Interrupted


class Interrupts:
    """Remembers that the user wants to stop. Work that can save itself asks `wanted`; other work is stopped at once.

    A second signal stops even work that is saving itself: what is on disk then is the state before. Stopping at once is
    an exception in the middle of anything, and may be lost there: Python drops what is raised in a destructor or a weak
    reference's callback, and libraries catch what they do not know. So work also calls `heed` wherever it tells how far
    it is.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._is_patient = False
        self._is_told = False  # a signal has come in this patient block

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Receive SIGINT and SIGTERM while the block runs."""
        previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While the block runs, a first signal only sets `wanted`."""
        self._is_patient, self._is_told = True, False
        try:
            yield
        finally:
            self._is_patient = False

    def check(self, save: Callable[[], None]) -> None:
        """If a stop is wanted, `save` and raise Interrupted."""
        if self.wanted:
            save()
            raise Interrupted("stopped; the state is saved")

    def heed(self) -> None:
        """Raise Interrupted if a stop is wanted and the work is none that saves itself first."""
        if self.wanted and not self._is_patient:
            raise Interrupted("stopped")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        if self._is_patient and not self._is_told:
            self._is_told = True
            return
        raise Interrupted("stopped")
