"""Writing folders and files so that a reader sees the whole of them or nothing, and a full disk is a clear refusal."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fledge.errors import DataError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well, and vanishes otherwise.

    Raises `DataError` if `folder` exists (nothing is overwritten) or if writing fails.
    """
    if folder.exists():
        raise DataError(f"{folder} exists already: expected a new name; remove it or name another folder")
    workplace: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield workplace
        for path in sorted(workplace.rglob("*")):
            sync(path)
        sync(workplace)
        workplace.rename(folder)
        workplace = None
        sync(folder.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"cannot write {folder}: {reason}; free space or choose another folder, then run again"
        ) from error
    finally:
        if workplace is not None:
            shutil.rmtree(workplace, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a folder written as `kind`; `DataError` if it is missing, damaged or of another kind."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: expected a folder of {kind}; build it again") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): delete {folder} and build it again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise DataError(f'{path} does not describe {kind}: expected "kind": "{kind}"; name the right folder')
    return manifest


def check_size(path: Path, expected_bytes: int) -> None:
    """`DataError` unless the file is there with just that many bytes."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} is missing: delete {path.parent} and build it again") from error
    if size != expected_bytes:
        raise DataError(
            f"{path} has {size:,} bytes, expected {expected_bytes:,}: truncated or altered; "
            f"delete {path.parent} and build it again"
        )
