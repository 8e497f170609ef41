"""The manifests of what data/ leaves on disk: reading them strictly, and checking the files they speak of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fledge.errors import DataError
from fledge.files import sha256_file

NAME = "manifest.json"


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a folder written as `kind`; `DataError` if it is missing, damaged or of another kind."""
    path = folder / NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: expected a folder of {kind}; build it again") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): delete {folder} and build it again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise DataError(f"{path} does not describe {kind}: name the right folder, or delete it and build it again")
    return manifest


def check_file(path: Path, num_bytes: int, sha256: str, *, verify: bool) -> None:
    """`DataError` unless the file is there with `num_bytes` bytes and, if `verify`, this sha256."""
    way_out = f"delete {path.parent} and build it again"
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} is missing: {way_out}") from error
    if size != num_bytes:
        raise DataError(f"{path} has {size:,} bytes, expected {num_bytes:,}: truncated or altered; {way_out}")
    if verify and sha256_file(path) != sha256:
        raise DataError(f"{path} was altered: its sha256 is not the one in {NAME}; {way_out}")
