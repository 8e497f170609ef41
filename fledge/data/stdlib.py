"""The running Python's standard library as code: pure text, pieces of a definition or a few.

Licence: PSF-2.0. Tests, IDLE, vendored pip and the generated tables of the codecs are left out: they would be a
third of the bytes and teach nothing. Files that are not UTF-8 (a few Latin-1 ones) are left out as well.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from fledge.data.cutting import cut_python
from fledge.data.filters import select
from fledge.data.reading import Split
from fledge.types import Provenance, TextExample

LICENCE = "PSF-2.0"
LEFT_OUT_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "lib2to3",
        "site-packages",
        "ensurepip",
        "encodings",
        "__pycache__",
    }
)
LEFT_OUT_FILES = frozenset({"pydoc_data/topics.py", "sre_constants.py", "lib-dynload"})


def examples(split: Split, *, cache: Path, seed: int) -> Iterator[TextExample]:
    """Pieces of the library's files. `cache` is not needed: the library is already here."""
    yield from select(_pieces(Path(sysconfig.get_path("stdlib"))), split, seed)


def _pieces(root: Path) -> Iterator[TextExample]:
    for path in sorted(_files(root)):
        name = path.relative_to(root)
        if name.as_posix() in LEFT_OUT_FILES or _is_generated(name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, piece in enumerate(cut_python(text)):
            yield TextExample(piece.strip("\n") + "\n", Provenance("stdlib", f"{name.as_posix()}#{number}", LICENCE))


def _files(root: Path) -> Iterator[Path]:
    """The Python files of the folders that are not left out; those, site-packages above all, are not even entered."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _is_generated(name: Path) -> bool:
    return name.name.startswith("_sysconfigdata")
