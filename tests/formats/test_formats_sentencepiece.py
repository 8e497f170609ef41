"""SentencePiece's own files: what is read of them, and that nothing in them is believed."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.errors import CheckpointError, TokenizerError
from fledge.formats import sentencepiece as files
from fledge.formats.huggingface_tokenizer import read_tokenizer
from fledge.formats.sentencepiece import read_sentencepiece
from fledge.text.published import adopt_published
from fledge.text.sentencepiece import Kind

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))
from sentencepiece_samples import directory, model, pieces


def varint(number: int) -> bytes:
    groups = [number & 0x7F]
    while number := number >> 7:
        groups.append(number & 0x7F)
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def message(fields: dict[int, Any]) -> bytes:
    return b"".join(field(number, value) for number, value in fields.items())


TRAINER: dict[int, Any] = {3: 2, 35: 1}
NORMALIZER: dict[int, Any] = {1: b"identity", 3: 1, 4: 0, 5: 1}


def written(trainer: dict[int, Any] = {}, normalizer: dict[int, Any] = {}, more: bytes = b"") -> bytes:  # noqa: B006
    """The vocabulary by hand as a protocol buffer by hand."""
    told = b"".join(field(1, message({1: p.text.encode(), 2: p.score, 3: int(p.kind)})) for p in pieces())
    return told + field(2, message(TRAINER | trainer)) + field(3, message(NORMALIZER | normalizer)) + more


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokenizer.model"


def test_pieces_scores_kinds_and_special_tokens_are_read(path: Path) -> None:
    path.write_bytes(written())
    found = read_sentencepiece(path)
    assert list(found.pieces) == pieces()
    assert (found.names, found.puts_space) == ({"bos": "<s>", "eos": "</s>"}, True)
    path.write_bytes(written({41: 2, 42: 1, 43: 0}, {3: 0}))
    found = read_sentencepiece(path)
    assert (found.names, found.puts_space) == ({"bos": "</s>", "eos": "<s>", "pad": "<unk>"}, False)
    path.write_bytes(written({41: (1 << 64) - 1}))  # -1: there is none
    assert read_sentencepiece(path).names == {"eos": "</s>"}


def test_what_sentencepiece_learned_is_read_as_it_says(path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    path.write_bytes(model(pad_id=3))
    theirs = library.SentencePieceProcessor(model_proto=model(pad_id=3))
    found = read_sentencepiece(path)
    assert [piece.text for piece in found.pieces] == [theirs.id_to_piece(i) for i in range(theirs.vocab_size())]
    assert [piece.score for piece in found.pieces] == [theirs.get_score(i) for i in range(theirs.vocab_size())]
    assert [piece.kind == Kind.BYTE for piece in found.pieces] == [theirs.is_byte(i) for i in range(len(theirs))]
    assert found.names == {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "must hold pieces"),
        (written({3: 1}), "SentencePiece's kind 'Unigram'; only its BPE is read"),
        (written({3: 4}), "kind 'character'"),
        (written({3: 9}), "kind '9'"),
        (written({3: b"2"}), "kind 'no number'"),
        (written({24: 1}), "treat_whitespace_as_suffix"),
        (written({}, {2: b"\x00rules"}), "its normalizer is no 'identity'"),
        (written({}, {4: 1}), "remove_extra_whitespaces"),
        (written({}, {5: 0}), "escape_whitespaces"),
        (written(more=field(1, message({1: b"a", 2: 0.0}))), "each once"),
        (written(more=field(1, message({2: 0.0}))), "must hold pieces"),
        (written(more=field(1, message({1: b"new", 2: float("nan")}))), "a score that is no number"),
        (written(more=field(1, message({1: b"\xff"}))), "damaged one"),
        (written(more=field(1, message({1: 7}))), "damaged one"),
        (written(more=field(1, message({1: b"new", 2: 7}))), "damaged one"),
        (written(more=field(1, message({1: b"new", 3: 7}))), "damaged one"),
        (written(more=field(1, 7)), "damaged one"),
        (written(more=field(2, 7)), "damaged one"),
        (written(more=b"\x0a\x05abc"), "cut off"),
        (written(more=b"\x0a" + b"\xff" * 9 + b"\x01"), "cut off"),
        (written(more=b"\xff" * 11), "cut off"),
        (written(more=b"\x0b"), "a field of kind 3"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(data: bytes, complaint: str, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.model: .*{complaint}") as refusal:
        read_sentencepiece(path)
    assert "\n" not in str(refusal.value)


def test_a_file_of_too_many_pieces_is_refused_before_they_are_held(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_PIECES", 100)
    path.write_bytes(b"\x0a\x00" * 101 + b"\x0b")
    with pytest.raises(CheckpointError, match="more than 100 pieces"):
        read_sentencepiece(path)
    monkeypatch.setattr(files, "MAX_BYTES", 10)
    with pytest.raises(CheckpointError, match="has more than 0 MB"):
        read_sentencepiece(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_sentencepiece(path)


@settings(deadline=None, max_examples=60)
@given(
    harm=st.dictionaries(st.integers(0, len(written()) - 1), st.integers(0, 255), min_size=1, max_size=4),
    size=st.just(len(written())) | st.integers(0, len(written())),
)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    harm: dict[int, int], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = bytearray(written())
    for place, byte in harm.items():
        whole[place] = byte
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(whole[:size])
    try:
        found, _ = adopt_published(read_tokenizer(folder), 2000)
    except (CheckpointError, TokenizerError):
        return
    assert found.decode(found.encode("a bird 天\n")) == "a bird 天\n"


# The directory around it.


def test_a_directory_with_a_tokenizer_model_alone_begins_texts_with_bos(tmp_path: Path) -> None:
    found = read_tokenizer(directory(tmp_path, written()))
    assert (found.bos, found.ends, found.pad, found.begins) == ("<s>", ("</s>",), None, True)
    settings_of = {"add_bos_token": False, "bos_token": "</s>", "eos_token": {"content": "<s>"}}
    found = read_tokenizer(directory(tmp_path, written(), **settings_of))
    assert (found.bos, found.ends, found.begins) == ("</s>", ("<s>",), False)


def test_a_space_stands_where_the_settings_say(tmp_path: Path) -> None:
    for said, opening in (
        ({}, "always"),
        ({"legacy": True}, "always"),
        ({"legacy": False}, "first"),
        ({"add_prefix_space": False}, "never"),
    ):
        found, _ = adopt_published(read_tokenizer(directory(tmp_path, written(), **said)), len(pieces()))
        assert found.opening == opening
    found, _ = adopt_published(read_tokenizer(directory(tmp_path, written({}, {3: 0}))), len(pieces()))
    assert found.opening == "never"


def test_tokens_that_were_added_later_are_the_tokenizer_s_too(tmp_path: Path) -> None:
    first = len(pieces())
    token = {"content": "<|im_end|>", "special": True, "lstrip": False}
    folder = directory(
        tmp_path, written(), added_tokens_decoder={str(first): token, "1": {"content": "<s>", "special": True}},
        pad_token="<pad>",
    )  # fmt: skip
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": first + 1, "<think>": first + 2}))
    found, _ = adopt_published(read_tokenizer(folder), first + 3)
    assert found.special_id("<|im_end|>") == first
    assert found.pad_id == first + 1
    assert found.encode("a<think>") == [*found.encode("a"), first + 2]
    assert found.decode(found.encode("<think> a<|im_end|>")) == "<think> a<|im_end|>"
    assert found.special_ids.isdisjoint(found.encode("<pad><|im_end|>"))


@pytest.mark.parametrize("added", [{"x": -1}, {"x": "7" * 5000}, {"x": None}, {"x": [1]}, {"": 999}])
def test_an_added_token_that_is_none_is_refused(added: dict[str, Any], tmp_path: Path) -> None:
    (directory(tmp_path, written()) / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(CheckpointError, match=r"adds a token .* of id .*, which is none"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_json_comes_before_a_tokenizer_model(tmp_path: Path) -> None:
    (directory(tmp_path, written()) / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer\.json"):
        read_tokenizer(tmp_path)
