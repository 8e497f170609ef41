"""An append-only record of work done: one JSON object a line, each on the disk before the next piece of work begins.

A process may be killed at any moment; what it leaves is whole lines and perhaps a broken last one, which is cut off
when the journal is opened again. So work goes on behind the last whole line and no line is ever written twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fledge.errors import RunError


class Journal:
    """`entries` are the lines that were there and those added since. The first line of the file says what the work
    was: opening a journal of other work raises `RunError`."""

    def __init__(self, path: Path, what: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(path)
        self.entries: list[dict[str, Any]] = lines[1:]
        if lines and lines[0] != what:
            changed = [key for key in what if lines[0].get(key) != what[key]] or list(lines[0])
            raise RunError(f"{path} is of other work ({', '.join(changed)} differ): choose another folder or delete it")
        self._file = path.open("a", encoding="utf-8")
        if not lines:
            self._write(what)

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; it is on the disk when this returns."""
        self._write(entry)
        self.entries.append(entry)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@dataclass
class Memo:
    """A journal that is kept nowhere, for work too short to be resumed."""

    entries: list[dict[str, Any]] = field(default_factory=list)

    def append(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)


@contextmanager
def open_journal(path: Path | None, what: dict[str, Any]) -> Iterator[Journal | Memo]:
    """The journal at `path`, closed at the end; without a path one that is kept nowhere."""
    if path is None:
        yield Memo()
        return
    with Journal(path, what) as journal:
        yield journal


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the file, which is cut behind the last whole one; `RunError` if one before it is damaged."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.decode("utf-8").splitlines() if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged ({error}); restore it or delete it and begin again") from error
