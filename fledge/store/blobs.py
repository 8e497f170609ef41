"""File contents by their SHA-256, in one folder. Layer 2, no torch.

Nothing of what a user calls a file becomes part of a path. A content is written under a temporary name, synced, and
renamed, so a crash leaves nothing half written under a hash; two equal contents are kept once.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from fledge.files import sync

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 16
_WRITING = ".writing-"


class Blobs:
    """The contents below `root`, spread over 256 folders."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, digest: str) -> Path:
        """Where the content of this hash lies, if it is there. `digest` comes from the database, never from a user."""
        assert _DIGEST.fullmatch(digest), "not a SHA-256"
        return self.root / digest[:2] / digest

    def writer(self) -> BlobWriter:
        """For `with`: `write` it piece by piece, then `keep` it; without `keep` nothing remains."""
        return BlobWriter(self)

    def put(self, content: bytes) -> str:
        with self.writer() as writer:
            writer.write(content)
            return writer.keep()

    def read(self, digest: str) -> bytes:
        return self.path(digest).read_bytes()

    def chunks(self, digest: str) -> Iterator[bytes]:
        with self.path(digest).open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def sweep_abandoned(self, older_than: float) -> None:
        """Delete what writers that died so many seconds ago have left."""
        for left in self.root.glob(f"{_WRITING}*"):
            with suppress(FileNotFoundError):  # another server sweeps too
                if time.time() - left.stat().st_mtime > older_than:
                    left.unlink()

    def remove(self, digest: str) -> None:
        """Delete a content that no row names any more."""
        self.path(digest).unlink(missing_ok=True)


class BlobWriter:
    """A content while it comes in. `num_bytes` have been written so far."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._hash = hashlib.sha256()
        self.num_bytes = 0
        blobs.root.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=_WRITING, dir=blobs.root)
        self._file: BinaryIO = os.fdopen(descriptor, "wb")
        self._temporary = Path(name)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)

    def keep(self) -> str:
        """Make the content last; returns its SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        digest = self._hash.hexdigest()
        path = self._blobs.path(digest)
        path.parent.mkdir(exist_ok=True)
        self._temporary.replace(path)
        sync(path.parent)
        return digest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)
