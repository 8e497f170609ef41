"""Ctrl-C and SIGTERM during long work: stop at the next safe place, or at once where there is nothing to save."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from fledge.errors import Interrupted


class Interrupts:
    """Remembers that the user wants to stop. Work that can save itself asks `wanted`; other work is stopped at once.

    A second signal stops even work that is saving itself: what is on disk then is the state before.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._is_patient = False

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
        self._is_patient = True
        try:
            yield
        finally:
            self._is_patient = False

    def check(self, save: Callable[[], None]) -> None:
        """If a stop is wanted, `save` and raise Interrupted."""
        if self.wanted:
            save()
            raise Interrupted("stopped; the state is saved")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._is_patient and not self.wanted:
            self.wanted = True
            return
        raise Interrupted("stopped")
