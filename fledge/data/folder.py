"""The user's own folder (or one file): text, code and chats in any language, found by what the files are called.

.jsonl and .parquet files are read as records, every other text file as documents; a text that is a dialogue of
"User:" and "Assistant:" lines becomes a conversation. Hidden folders and the ones tools make are not entered.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

from fledge.data import jsonl, parquet
from fledge.data.cutting import cut_prose, cut_python
from fledge.data.filters import select
from fledge.data.jsonl import USER_LICENCE
from fledge.data.reading import BLOCK_BYTES, Drops, Example, Split, cannot_read, open_binary, shown, text_blocks
from fledge.errors import DataError
from fledge.types import ChatExample, Conversation, Message, Provenance, Role, TextExample


def _suffixes(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


PROSE_SUFFIXES = _suffixes("txt text md markdown rst tex org adoc srt csv tsv html htm xml log")
CODE_SUFFIXES = _suffixes(
    "py pyi c h cc cpp hpp cs go java js jsx ts tsx kt swift rs rb php pl lua r jl scala hs ml clj ex erl sh bash zsh "
    "sql css scss vue svelte dart m f90 asm s proto cmake json yaml yml toml ini cfg"
)
RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson", ".parquet"})
TEXT_NAMES = frozenset({"readme", "license", "licence", "copying", "makefile", "dockerfile", "changelog", "authors"})
LEFT_OUT_FOLDERS = frozenset({"__pycache__", "node_modules", "venv", "build", "dist", "target"})
# What a run and a model of ours are known by: `--text .` must not read what it has just written.
OURS = (frozenset({"plan.json", ".lock"}), frozenset({"run.json", "model.safetensors"}))

_SPEAKERS: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "系统": "system",
    "用户": "user",
    "问": "user",
    "助手": "assistant",
    "答": "assistant",
}
_NAMES = "|".join(_SPEAKERS)
_MARK = r"(?:\*\*|#+ )?"  # bold or a heading, as transcripts pasted from web pages have
_TURN = re.compile(rf"^{_MARK}({_NAMES})(?:\*\*)?[ \t]*[:：](?:\*\*)?[ \t]*", re.IGNORECASE | re.MULTILINE)


def examples(split: Split, *, cache: Path, seed: int) -> Iterator[Example]:
    """The folder as a source: `cache` is the user's folder (or file) itself; strict about what cannot be used."""
    yield from select(path_examples(cache, "user"), split, seed)


Content = Literal["code", "other"]


def path_examples(
    path: Path,
    source: str,
    *,
    only: Content | None = None,
    drops: Drops | None = None,
    bad: Drops | None = None,
) -> Iterator[Example]:
    """The examples of every file under `path`, in the order of the paths.

    `drops` counts what holds no text anyone could want trained on: empty files, files of no known text suffix, links
    that lead nowhere. Files that should have been text and are not (binary, not UTF-8, broken records) raise
    `DataError`, or, given `bad`, are counted there. A path that does not exist, an empty folder, or one in which
    nothing is text raises `DataError`. `only` reads the files of program code alone, or all others.
    """
    drops = Drops() if drops is None else drops
    if not path.exists():
        raise DataError(f"{path} does not exist: expected a folder or a file of text; check the path")
    if not path.is_dir():
        yield from _required(_file_examples(path, path.name, source, bad), f"{path} is empty: expected text")
        return
    usable = (file for file in _wanted(path, drops, bad) if only in (None, content_of(file)))
    found = chain.from_iterable(
        _counted(file, _file_examples(file, file.relative_to(path).as_posix(), source, bad), drops, bad)
        for file in usable
    )
    yield from _required(found, f"{path} holds no text", drops)


def content_of(file: Path) -> Content:
    """What a file holds, by its suffix."""
    return "code" if file.suffix.lower() in CODE_SUFFIXES else "other"


def contents(path: Path) -> frozenset[Content]:
    """What the files hold that `path_examples` would read."""
    return frozenset(map(content_of, _read_files(path)))


def num_bytes(path: Path) -> int:
    """The size of all files that `path_examples` would read."""
    return sum(file.stat().st_size for file in _read_files(path))


def content_hash(path: Path) -> str:
    """The sha256 of the names and contents of all files that `path_examples` would read."""
    digest = hashlib.sha256()
    for file in _read_files(path):
        with open_binary(file) as content:
            digest.update(f"{file.relative_to(path).as_posix()}\n".encode("utf-8", "surrogateescape"))
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _required(examples: Iterator[Example], complaint: str, drops: Drops | None = None) -> Iterator[Example]:
    first = next(examples, None)
    if first is None:
        details = f" ({drops})" if drops and drops.counts else ""
        raise DataError(f"{complaint}{details}; add files such as .txt, .md, .py or .jsonl, or name another path")
    yield first
    yield from examples


def _read_files(path: Path) -> Iterator[Path]:
    """The files that `path_examples` would read."""
    return iter([path]) if path.is_file() else _wanted(path, Drops(), None)


def _wanted(root: Path, drops: Drops, bad: Drops | None) -> Iterator[Path]:
    return (file for file in _files(root, drops, bad) if _is_wanted(file, drops))


def _files(root: Path, drops: Drops, bad: Drops | None) -> Iterator[Path]:
    """All files below `root`, sorted; each folder is entered once, so links in a circle end.

    A folder that may not be read raises `DataError`, or, given `bad`, is counted there.
    """

    def refuse(error: OSError) -> None:
        if bad is None:
            raise cannot_read(Path(error.filename), error) from error
        bad.add("folder that cannot be read", error.filename)

    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            drops.add("folder met before (a link)", folder)
            continue
        seen.add((status.st_dev, status.st_ino))
        if any(marks.issubset(names) for marks in OURS):
            subfolders.clear()
            drops.add("run or model of fledge", folder)
            continue
        for name in sorted(subfolders):
            if name.startswith(".") or name in LEFT_OUT_FOLDERS:
                drops.add("hidden folder or one that tools make", f"{folder}/{name}")
        subfolders[:] = sorted(s for s in subfolders if not s.startswith(".") and s not in LEFT_OUT_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names))


def _is_wanted(file: Path, drops: Drops) -> bool:
    is_text = file.suffix.lower() in PROSE_SUFFIXES | CODE_SUFFIXES or file.stem.lower() in TEXT_NAMES
    if not is_text and file.suffix.lower() not in RECORD_SUFFIXES:
        drops.add("not a text file by its name", str(file))
        return False
    if os.path.islink(file) and not os.path.exists(file):  # Path's own raise where access is denied
        drops.add("link that leads nowhere", str(file))
        return False
    return True


def _counted(file: Path, found: Iterator[Example], drops: Drops, bad: Drops | None) -> Iterator[Example]:
    """The examples of one file; an empty one counted, and, given `bad`, one that cannot be read as well."""
    is_empty = True
    num_bad = bad.counts.total() if bad else 0
    try:
        for example in found:
            is_empty = False
            yield example
    except DataError as error:
        if bad is None:
            raise
        bad.add("file that cannot be used", str(error))
        return
    if is_empty and num_bad == (bad.counts.total() if bad else 0):
        drops.add("empty file", str(file))


def _file_examples(file: Path, name: str, source: str, bad: Drops | None) -> Iterator[Example]:
    name, suffix = shown(name), file.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from jsonl.file_examples(file, source, bad=bad)
    elif suffix == ".parquet":
        yield from parquet.file_examples(file, source, bad=bad)
    else:
        yield from _text_examples(file, name, source)


def _text_examples(file: Path, name: str, source: str) -> Iterator[Example]:
    """A text file as documents, holding no more than a few blocks of it at a time."""
    blocks = text_blocks(file)
    head = next(blocks, "")
    following = next(blocks, None)
    if following is None:
        yield from _whole_text(head, name, source)
        return
    number = 0
    for piece in _stream_pieces(chain([head, following], blocks)):
        if piece.strip():
            yield TextExample(piece, Provenance(source, f"{name}#{number}", USER_LICENCE))
            number += 1


def _whole_text(text: str, name: str, source: str) -> Iterator[Example]:
    conversation = as_dialogue(text)
    if conversation is not None:
        yield ChatExample(conversation, Provenance(source, name, USER_LICENCE))
        return
    pieces = cut_python(text) if name.endswith((".py", ".pyi")) else [text]
    for number, piece in enumerate(pieces):
        if piece.strip():
            identity = name if len(pieces) == 1 else f"{name}#{number}"
            yield TextExample(piece, Provenance(source, identity, USER_LICENCE))


def _stream_pieces(blocks: Iterator[str]) -> Iterator[str]:
    """A text of any size in pieces of at most BLOCK_BYTES characters, cut between paragraphs where there are any."""
    held = ""
    for block in blocks:
        *whole, held = cut_prose(held + block, BLOCK_BYTES) or [""]
        yield from whole
    if held:
        yield held


def as_dialogue(text: str) -> Conversation | None:
    """The conversation a transcript of "User: ..." and "Assistant: ..." paragraphs records; None for any other text."""
    turns = list(_TURN.finditer(text))
    roles = [_SPEAKERS[turn.group(1).lower()] for turn in turns]
    if not turns or text[: turns[0].start()].strip() or not {"user", "assistant"} <= set(roles):
        return None
    ends = [*(turn.start() for turn in turns[1:]), len(text)]
    return Conversation(
        tuple(
            Message.of(role, text[turn.end() : end].strip()) for role, turn, end in zip(roles, turns, ends, strict=True)
        )
    )
