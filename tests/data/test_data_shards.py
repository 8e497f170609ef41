"""Shards: what is read is what was written, and a damaged file is refused by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fledge.data.pack import PackedRows, ShardDocuments
from fledge.data.shards import Shards, write_shards
from fledge.errors import DataError
from fledge.types import Provenance, TextExample


class Utf8Encoder:
    """A tokenizer of bytes: byte b is token b + 1; 0 is end of text."""

    end_of_text_id = 0
    hash = "bytes"

    def __init__(self, vocab_size: int = 257) -> None:
        self.vocab_size = vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + 1 for byte in text.encode()] for text in texts]


TEXTS = [("first text", "a"), ("zwei", "b"), ("三国演义", "a"), ("x" * 50, "b")]


def documents() -> list[TextExample]:
    return [TextExample(text, Provenance(source, "1", "MIT")) for text, source in TEXTS]


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return write_shards(documents(), Utf8Encoder(), tmp_path / "s", shard_tokens=12)


def test_documents_come_back_between_their_end_of_text_tokens(shards: Shards) -> None:
    assert len(list(shards.folder.glob("*.tokens"))) == 3
    assert shards.num_documents == len(TEXTS)
    for number, (text, source) in enumerate(TEXTS):
        expected = [0, *(byte + 1 for byte in text.encode()), 0]
        assert shards.document(number).tolist() == expected
        assert shards.ids(number, 1, 2).tolist() == expected[1:4]
        assert shards.num_bytes_N[number] == len(text.encode())
        assert shards.sources[shards.source_N[number]] == source
    assert shards.num_positions == sum(len(text.encode()) + 1 for text, _ in TEXTS)
    assert shards.of_sources(["b"]).tolist() == [1, 3]


def test_the_manifest_counts_documents_tokens_bytes_and_licences(shards: Shards) -> None:
    assert shards.counts["a"] == {"documents": 2, "tokens": 22, "bytes": 22, "licences": ["MIT"]}
    assert shards.tokenizer_hash == "bytes"


def test_tokens_take_two_bytes_where_the_vocabulary_allows_and_four_otherwise(tmp_path: Path) -> None:
    small = write_shards(documents(), Utf8Encoder(1 << 16), tmp_path / "small")
    large = write_shards(documents(), Utf8Encoder((1 << 16) + 1), tmp_path / "large")
    sizes = [(folder / "00000.tokens").stat().st_size for folder in (small.folder, large.folder)]
    assert sizes[1] == 2 * sizes[0]
    assert small.document(2).tolist() == large.document(2).tolist()


def test_packed_shards_lose_no_token_and_can_be_chosen_by_source(shards: Shards) -> None:
    packed = PackedRows(ShardDocuments(shards, shards.of_sources(["a"])), 8, seed=0)
    rows = packed.batch(0, packed.num_rows(0))
    targets = sorted(int(target) for row in rows for piece in row for target in piece.ids[1:])
    assert targets == sorted(int(i) for n in (0, 2) for i in shards.document(n)[1:])
    assert all(piece.loss_mask.min() == 1 and piece.ids.dtype == np.int32 for row in rows for piece in row)


@pytest.mark.parametrize("name", ["00001.tokens", "00001.index"])
def test_a_truncated_file_is_refused_by_name(shards: Shards, name: str) -> None:
    path = shards.folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{name} has .* truncated or altered; delete"):
        Shards.open(shards.folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        Shards.open(shards.folder)


def test_an_altered_file_is_refused_when_contents_are_verified(shards: Shards) -> None:
    path = shards.folder / "00000.tokens"
    content = bytearray(path.read_bytes())
    content[4] ^= 1
    path.write_bytes(content)
    Shards.open(shards.folder)
    with pytest.raises(DataError, match=r"00000\.tokens was altered"):
        Shards.open(shards.folder, verify=True)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist: expected a folder of fledge token shards"):
        Shards.open(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "something"}))
    with pytest.raises(DataError, match="does not describe fledge token shards"):
        Shards.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        Shards.open(tmp_path)


def test_no_document_and_an_unknown_source_are_refused(shards: Shards, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document to tokenize"):
        write_shards([], Utf8Encoder(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(DataError, match="holds no source 'c': it has a, b"):
        shards.of_sources(["c"])


def test_a_failure_while_writing_leaves_what_was_there(shards: Shards) -> None:
    def failing() -> object:
        yield documents()[0]
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_shards(failing(), Utf8Encoder(), shards.folder)  # type: ignore[arg-type]
    assert Shards.open(shards.folder, verify=True).num_documents == len(TEXTS)
    assert sorted(path.name for path in shards.folder.parent.iterdir()) == ["s"]
