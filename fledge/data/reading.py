"""Reading the user's files: bounded memory, strict UTF-8, and an answer for every file that cannot be used.

Bottom of data/: every source that opens a file does it here. A problem is a one-line `DataError` unless the caller
hands in a `Drops`, which counts it instead; nothing is ever skipped without one or the other.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from fledge.errors import DataError
from fledge.types import ChatExample, TextExample

Example = TextExample | ChatExample
Split = Literal["train", "validation", "all"]

MAX_LINE_BYTES = 16 << 20  # a longer JSON line is a mistake far more often than a record
BLOCK_BYTES = 1 << 20


def shown(path: Path | str) -> str:
    """A path as text that can be written down: bytes of a name that are no UTF-8 (old archives) become U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")


class Drops:
    """Counts what a source could not use: `counts[reason]`, and the first place each reason was met."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, shown(where))

    def to_json(self) -> dict[str, Any]:
        return {reason: {"count": count, "first": self.first[reason]} for reason, count in self.counts.items()}

    def __str__(self) -> str:
        return "; ".join(f"{count} x {reason} (first: {self.first[reason]})" for reason, count in self.counts.items())


def open_binary(path: Path) -> io.BufferedReader:
    """The regular file at `path`, open for reading; `DataError` where that is not possible.

    Pipes and devices are refused before they are opened, because opening one can wait for ever.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path} is not a regular file: expected a file of text; leave it out or name a file")
        return path.open("rb")
    except OSError as error:
        raise cannot_read(path, error) from error


def cannot_read(path: Path, error: OSError) -> DataError:
    """What to say of a file or a folder that the system does not let us read."""
    reason = error.strerror or type(error).__name__
    return DataError(f"cannot read {shown(path)}: {reason}; check the path and its permissions, or leave it out")


def real_path(path: Path, setting: str) -> Path:
    """The place that `path`, given as `setting`, names, links and `~` followed; `DataError` if there is nothing."""
    try:
        place = path.expanduser().resolve()
        place.stat()
    except FileNotFoundError as error:
        raise DataError(f"{setting} {shown(path)}: there is no such folder or file; check the path") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, `~` of an unknown user
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise DataError(f"{setting} {shown(path)}: {reason}; check the path") from error
    return place


def open_unpacked(path: Path) -> io.BufferedIOBase:
    """`open_binary`, and what a file that ends in .gz holds."""
    file = open_binary(path)
    if path.suffix.lower() != ".gz":
        return file
    file.close()
    return gzip.GzipFile(path)


def text_blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[str]:
    """The file's text in blocks of about `block_bytes`, newlines as \\n, a byte order mark removed.

    Raises `DataError` for NUL bytes (a binary file) and for invalid UTF-8, naming the byte where it stands.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
    offset = 0
    with open_unpacked(path) as file:
        while True:
            raw = _read(file, path, block_bytes)
            block = raw.removeprefix(codecs.BOM_UTF8) if offset == 0 else raw
            _refuse_nul(path, raw, offset)
            pending = len(decoder.getstate()[0])
            try:
                text = newlines.decode(block, final=not raw)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + len(raw) - len(block) - pending + error.start, error) from error
            if text:
                yield text
            if not raw:
                return
            offset += len(raw)


def lines(path: Path, max_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 file, blank lines left out; never holds more than a line.

    Raises `DataError` for a line longer than `max_bytes`, NUL bytes and invalid UTF-8, naming the line.
    """
    with open_unpacked(path) as file:
        number = 0
        while raw := _read_line(file, path, max_bytes + 1):
            number += 1
            if len(raw) > max_bytes and not raw.endswith(b"\n"):
                raise DataError(
                    f"{path}, line {number} is longer than {max_bytes:,} bytes: expected one record a line; "
                    "split the record or store the text as a .txt file"
                )
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            _refuse_nul(f"{path}, line {number}", raw, 0)
            try:
                line = raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise _not_utf8(f"{path}, line {number}", error.start, error) from error
            if line:
                yield number, line


def _read(file: io.BufferedIOBase, path: Path, size: int) -> bytes:
    with _explaining(path):
        return file.read(size)


def _read_line(file: io.BufferedIOBase, path: Path, size: int) -> bytes:
    with _explaining(path):
        return file.readline(size)


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Turn what a disk or a packed file answers into one line that says what to do."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is damaged or no gzip file ({error}); fetch it again or leave it out") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; copy the file elsewhere or leave it out") from error


def _refuse_nul(where: Path | str, block: bytes, offset: int) -> None:
    position = block.find(b"\0")
    if position >= 0:
        raise DataError(
            f"{where} has a NUL byte at byte {offset + position}: expected UTF-8 text, this is binary or UTF-16; "
            "convert it to UTF-8 or leave it out"
        )


def _not_utf8(where: Path | str, position: int, error: UnicodeDecodeError) -> DataError:
    value = error.object[error.start]
    return DataError(
        f"{where} is not valid UTF-8: byte 0x{value:02x} at byte {position}; "
        "convert it (for example: iconv -f GB18030 -t UTF-8) or leave it out"
    )
