"""Writing files and directories so that a crash, a full disk or a second reader never sees half of one; and reading
JSON that others wrote.

Everything is written to a temporary name beside its place, synced, and renamed; what a rename has not made visible
does not exist.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fledge.errors import CheckpointError, RunError

TEMPORARY_SUFFIX = ".writing"


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, whole or not at all; `RunError` if the disk is full or the place cannot be written."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Replace `path` by readable JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a temporary file, then put it in the place of `path`."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fill(temporary)
            sync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_directory(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write into a temporary directory, then give it the name `path`, replacing what is there."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with explaining(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            for entry in temporary.iterdir():
                sync(entry)
            sync(temporary)
            _replace_directory(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(path.parent)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that others wrote; `CheckpointError`, naming the file, if there is none in it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object; fetch it again")
    return data


def sync(path: Path) -> None:
    """Have the kernel put a file or a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace_directory(temporary: Path, path: Path) -> None:
    """A rename cannot replace a filled directory: the old one steps aside first and is removed last."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write `path` into one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise RunError(_explanation(path, error)) from error
    except SafetensorError as error:
        raise RunError(f"{path}: not written ({error}); free disk space and run the command again") from error


def _explanation(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"{path}: the disk is full; nothing was overwritten. Free some space and run the same command again"
    if error.errno == errno.EDQUOT:
        return f"{path}: the disk quota is used up; nothing was overwritten. Free some space and run the command again"
    return f"{path}: cannot be written ({error.strerror}); nothing was overwritten. Check its folder"
