"""SentencePiece's own file, `tokenizer.model`: a protocol buffer of pieces and of the rules to cut text by.

Read by hand, because of the format's five kinds of fields three are met here and nothing is ever written. Nothing in a
file is believed: every length is held against what is left of it, and what would change texts is refused by name.
Source: src/sentencepiece_model.proto of google/sentencepiece, and the encoding guide of Protocol Buffers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.errors import CheckpointError
from fledge.text.sentencepiece import Kind, Piece

MAX_BYTES, MAX_PIECES = 16 << 20, 1 << 20  # the largest published have 5 MB and 262,144 pieces
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BPE = 2
_MODEL_TYPES = {1: "Unigram", 3: "word", 4: "character"}


@dataclass(frozen=True)
class SentencePieceModel:
    """`names` has the tokens that begin ("bos"), end ("eos") and fill up ("pad") texts, where there are any."""

    pieces: tuple[Piece, ...]
    puts_space: bool
    names: dict[str, str]


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The vocabulary of a `tokenizer.model`; `CheckpointError` for one that is damaged, or changes texts."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: has more than {MAX_BYTES >> 20} MB, which no vocabulary has")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); fetch it again") from error
    try:
        pieces, trainer, normalizer = _read(data)
    except (ValueError, TypeError, struct.error) as error:
        raise CheckpointError(f"{path}: not a tokenizer.model, or a damaged one ({error}); fetch it again") from error
    _refuse_strange(path, pieces)
    _refuse_what_changes_texts(path, trainer, normalizer)
    ids = {"bos": trainer.get(41, 1), "eos": trainer.get(42, 2), "pad": trainer.get(43, -1)}
    names = {name: pieces[i].text for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(pieces)}
    return SentencePieceModel(pieces, bool(normalizer.get(3, 1)), names)


def _read(data: bytes) -> tuple[tuple[Piece, ...], dict[int, Any], dict[int, Any]]:
    """(the pieces, the fields of the trainer's settings, those of the normalizer's). Of several fields of one number
    the last counts, as the format has it."""
    pieces: list[Piece] = []
    settings: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, message in _fields(data):
        if number == 1:
            pieces.append(_piece(message))
        elif number in settings:
            settings[number].update(_fields(message))
        if len(pieces) > MAX_PIECES:
            raise ValueError(f"it has more than {MAX_PIECES} pieces")
    return tuple(pieces), settings[2], settings[3]


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    text, score, kind = fields.get(1, b""), fields.get(2, 0.0), fields.get(3, int(Kind.NORMAL))
    if not isinstance(text, bytes) or not isinstance(score, float) or kind not in set(Kind):
        raise ValueError("a piece is none")
    return Piece(text.decode(), score, kind)


def _refuse_what_changes_texts(path: Path, trainer: dict[int, Any], normalizer: dict[int, Any]) -> None:
    kind = trainer.get(3, 1)
    if kind != _BPE:
        name = _MODEL_TYPES.get(kind, kind) if isinstance(kind, int) else "no number"
        raise CheckpointError(f"{path}: a vocabulary of SentencePiece's kind '{name}'; only its BPE is read")
    rules = (
        (normalizer.get(2, b"") == b"", "rewrites letters (its normalizer is no 'identity')"),
        (not normalizer.get(4, 1), "removes spaces (remove_extra_whitespaces)"),
        (bool(normalizer.get(5, 1)), "does not spell spaces (escape_whitespaces)"),
        (not trainer.get(24, 0), "puts spaces behind words (treat_whitespace_as_suffix)"),
    )
    for holds, complaint in rules:
        if not holds:
            raise CheckpointError(f"{path}: {complaint}, so that texts would not come back from its tokens")


def _refuse_strange(path: Path, pieces: tuple[Piece, ...]) -> None:
    texts = {piece.text for piece in pieces}
    if not 0 < len(texts) == len(pieces) or "" in texts:
        raise CheckpointError(f"{path}: must hold pieces, each once; fetch it again")
    if not all(math.isfinite(piece.score) for piece in pieces):
        raise CheckpointError(f"{path}: has a score that is no number; fetch it again")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of every field: an integer, a float (of 32 bits; of 64 none is met) or bytes. `ValueError` for
    what is no message."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value: Any
            value, place = _varint(data, place)
            yield number, value if value < 1 << 63 else value - (1 << 64)
            continue
        if kind == _BYTES:
            size, place = _varint(data, place)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of kind {kind}")
        if size > len(data) - place:
            raise ValueError("it is cut off")
        value = data[place : place + size]
        yield number, struct.unpack("<f", value)[0] if kind == _FIXED32 else value
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """(a number in groups of seven bits, the lowest first; the place behind it)."""
    value = 0
    for count, byte in enumerate(data[place : place + 10]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value & (1 << 64) - 1, place + count + 1
    raise ValueError("it is cut off")
