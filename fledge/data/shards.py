"""Tokenized documents on disk, memory-mapped: what pretraining reads.

A folder holds shards `00000.tokens` (uint16 or uint32, little-endian: end-of-text, document, end-of-text, document,
..., end-of-text) and `00000.index` (one `INDEX` record a document), and `manifest.json` with sizes, sha256, the
tokenizer's hash and the counts of each source. A document of n tokens thus gives n+1 positions, and the token that
closes it opens the next. Byte counts stand beside the tokens because bits per byte needs them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fledge.data.manifest import NAME, check_file, read_manifest
from fledge.errors import DataError
from fledge.files import write_directory
from fledge.types import TextExample

KIND = "fledge token shards"
INDEX = np.dtype([("start", "<i8"), ("num_bytes", "<i8"), ("source", "<i4")])
SHARD_TOKENS = 1 << 27
BATCH_CHARS = 1 << 21  # text tokenized at once: enough for the library's threads, little in memory


class Encoder(Protocol):
    """What shards ask of a tokenizer (text/tokenizer.py)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text_id(self) -> int: ...
    @property
    def hash(self) -> str: ...
    def encode_batch(self, texts: Sequence[str], /) -> Sequence[Sequence[int]]: ...


@dataclass
class SourceCount:
    """Totals of one source: documents, their tokens (without end-of-text) and their UTF-8 bytes."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    licences: set[str] = field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "licences": sorted(self.licences)}


def write_shards(
    documents: Iterable[TextExample], encoder: Encoder, folder: Path, *, shard_tokens: int = SHARD_TOKENS
) -> Shards:
    """Tokenize `documents` into a folder of shards of about `shard_tokens` tokens, in the order given.

    A folder that is there already is replaced once the new one is whole. Raises `DataError` when there is no document,
    `RunError` when the disk is full.
    """

    def fill(workplace: Path) -> None:
        writer = _Writer(workplace, encoder)
        for example, ids in _encoded(documents, encoder):
            writer.add(example, ids)
            if writer.num_tokens >= shard_tokens:
                writer.finish_shard()
        writer.finish_shard()
        if not writer.files:
            raise DataError(f"no document to tokenize for {folder}: expected at least one; add text to the corpus")
        writer.write_manifest()

    write_directory(folder, fill)
    return Shards.open(folder)


class Shards:
    """All documents of a folder of shards, numbered from 0. Arrays of one entry a document end in `_N`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.tokenizer_hash: str = manifest["tokenizer"]
        self.vocab_size: int = manifest["vocab_size"]
        self.end_of_text_id: int = manifest["end_of_text_id"]
        self.counts: dict[str, dict[str, Any]] = manifest["sources"]
        self.sources: tuple[str, ...] = tuple(self.counts)
        self._streams = [_map(folder / file["tokens"], manifest["dtype"]) for file in manifest["files"]]
        indices = [_map(folder / file["index"], INDEX) for file in manifest["files"]]
        self._shard_N = np.repeat(np.arange(len(indices)), [len(index) for index in indices])
        self._start_N = np.concatenate([index["start"] for index in indices])
        self.num_bytes_N: NDArray[np.int64] = np.concatenate([index["num_bytes"] for index in indices])
        self.source_N: NDArray[np.int32] = np.concatenate([index["source"] for index in indices])
        ends = [
            np.append(index["start"][1:], len(stream) - 1) for index, stream in zip(indices, self._streams, strict=True)
        ]
        self.num_positions_N: NDArray[np.int64] = np.concatenate(ends) - self._start_N

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> Shards:
        """The shards in `folder`; sizes are always checked, contents too if `verify`.

        Raises `DataError` naming the file that is missing, truncated or altered, and the way out.
        """
        manifest = read_manifest(folder, KIND)
        for file in manifest["files"]:
            for part in ("tokens", "index"):
                check_file(folder / file[part], file[f"{part}_bytes"], file[f"{part}_sha256"], verify=verify)
        return cls(folder, manifest)

    @property
    def num_documents(self) -> int:
        return len(self._start_N)

    @property
    def num_positions(self) -> int:
        """Predictions in one pass over all documents: their tokens and one end-of-text each."""
        return int(self.num_positions_N.sum())

    def ids(self, document: int, start: int, length: int) -> NDArray[np.int32]:
        """`length`+1 ids of a document from position `start`: position 0 is the end-of-text that opens it."""
        stream = self._streams[self._shard_N[document]]
        first = int(self._start_N[document]) + start
        ids: NDArray[np.int32] = stream[first : first + length + 1].astype(np.int32)
        return ids

    def document(self, document: int) -> NDArray[np.int32]:
        """The whole document between its two end-of-text tokens, both included."""
        return self.ids(document, 0, int(self.num_positions_N[document]))

    def of_sources(self, names: Iterable[str]) -> NDArray[np.int64]:
        """The numbers of the documents that come from these sources; `DataError` for a source that is not here."""
        wanted = []
        for name in names:
            if name not in self.counts:
                raise DataError(f"{self.folder} holds no source '{name}': it has {', '.join(self.sources)}")
            wanted.append(self.sources.index(name))
        return np.flatnonzero(np.isin(self.source_N, wanted)).astype(np.int64)


class _Writer:
    """Holds the shard being filled, and what the manifest will say."""

    def __init__(self, workplace: Path, encoder: Encoder) -> None:
        self.files: list[dict[str, Any]] = []
        self._workplace = workplace
        self._encoder = encoder
        self._dtype = np.dtype("<u2" if encoder.vocab_size <= 1 << 16 else "<u4")
        self._counts: dict[str, SourceCount] = {}
        self._source_ids: dict[str, int] = {}
        self._clear()

    def _clear(self) -> None:
        self._chunks = [np.array([self._encoder.end_of_text_id], self._dtype)]
        self._index: list[tuple[int, int, int]] = []
        self.num_tokens = 1

    def add(self, example: TextExample, ids: Sequence[int]) -> None:
        source = example.provenance.source
        num_bytes = len(example.text.encode())
        count = self._counts.setdefault(source, SourceCount())
        count.documents += 1
        count.tokens += len(ids)
        count.bytes += num_bytes
        count.licences.add(example.provenance.licence)
        source_id = self._source_ids.setdefault(source, len(self._source_ids))
        self._index.append((self.num_tokens - 1, num_bytes, source_id))
        self._chunks.append(np.array([*ids, self._encoder.end_of_text_id], self._dtype))
        self.num_tokens += len(ids) + 1

    def finish_shard(self) -> None:
        if not self._index:
            return
        name = f"{len(self.files):05d}"
        tokens = self._write(f"{name}.tokens", np.concatenate(self._chunks))
        index = self._write(f"{name}.index", np.array(self._index, INDEX))
        self.files.append(
            {f"{part}{key}": value for part, facts in (("tokens", tokens), ("index", index)) for key, value in facts}
        )
        self._clear()

    def write_manifest(self) -> None:
        manifest = {
            "kind": KIND,
            "version": 1,
            "tokenizer": self._encoder.hash,
            "vocab_size": self._encoder.vocab_size,
            "end_of_text_id": self._encoder.end_of_text_id,
            "dtype": self._dtype.str,
            "sources": {name: count.to_json() for name, count in self._counts.items()},
            "files": self.files,
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (self._workplace / NAME).write_text(text, encoding="utf-8")

    def _write(self, name: str, array: NDArray[Any]) -> list[tuple[str, str | int]]:
        data = array.tobytes()
        (self._workplace / name).write_bytes(data)
        return [("", name), ("_bytes", len(data)), ("_sha256", hashlib.sha256(data).hexdigest())]


def _encoded(documents: Iterable[TextExample], encoder: Encoder) -> Iterator[tuple[TextExample, Sequence[int]]]:
    """Every document with its token ids, tokenized in batches of about BATCH_CHARS characters."""
    batch: list[TextExample] = []
    num_chars = 0
    for example in itertools.chain(documents, [None]):
        if example is not None:
            batch.append(example)
            num_chars += len(example.text)
        if batch and (example is None or num_chars >= BATCH_CHARS):
            yield from zip(batch, encoder.encode_batch([held.text for held in batch]), strict=True)
            batch, num_chars = [], 0


def _map(path: Path, dtype: str | np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(path, dtype=np.dtype(dtype), mode="r")
