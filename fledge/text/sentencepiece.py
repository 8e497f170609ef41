"""Vocabularies of SentencePiece (Llama 2, Mistral, TinyLlama): pieces with scores <-> a tokenizer.json; their bytes.

Layer 2, beneath text/foreign.py. A space is spelled "▁" there, and what no piece holds is spelled in tokens of bytes,
<0x00> to <0xFF>. So every token has exact bytes and every text comes back, with one thing to know: most of these
tokenizers put a space before a text that is not its own (`Opening`). Sources: Kudo & Richardson 2018
(arXiv:1808.06226), section 3; `bpe_model.cc` of google/sentencepiece; src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from typing import Any, Literal

from fledge.errors import TokenizerError

SPACE = "▁"
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
# Of the bytes that UTF-8 never holds one may have become padding (text/foreign.py).
NEEDED = {name for name, byte in BYTES.items() if byte not in (0xC0, 0xC1) and byte < 0xF5}
# Of ordinary pieces, which are taken apart in every way; published vocabularies stay below 50, and 3 million together.
MAX_PIECE_CHARS, MAX_CHARS = 512, 1 << 24

# Where a space of the tokenizer's own stands: before a text and after every special token, before a text only, nowhere.
Opening = Literal["always", "first", "never"]


class Kind(IntEnum):
    """What a piece is: the numbers of sentencepiece_model.proto and of GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """A token. Of two neighbours whose pieces could be joined those of the higher `score` are joined first."""

    text: str
    score: float
    kind: int = Kind.NORMAL


ADDED = {"single_word": False, "lstrip": False, "rstrip": False}
_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_FROM_SPACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
_FROM_BYTES: tuple[dict[str, Any], ...] = ({"type": "ByteFallback"}, {"type": "Fuse"})
_WITHOUT_FIRST = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def parts(component: Any) -> Iterator[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer of a tokenizer.json, or what stands inside when it is a sequence."""
    if isinstance(component, Mapping):
        inner = component.get("pretokenizers", component.get("normalizers"))
        if isinstance(inner, list):
            for part in inner:
                yield from parts(part)
        else:
            yield component


def is_sentencepiece(layout: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json spells a space as SentencePiece does."""
    return _TO_SPACE in parts(layout.get("normalizer")) or any(map(_is_metaspace, parts(layout.get("pre_tokenizer"))))


def opening_of(layout: Mapping[str, Any]) -> Opening:
    """Where a tokenizer.json of SentencePiece's kind puts a space of its own."""
    if _PREPEND in parts(layout.get("normalizer")):
        return "always"
    for part in filter(_is_metaspace, parts(layout.get("pre_tokenizer"))):
        scheme = part.get("prepend_scheme", "always") if part.get("add_prefix_space", True) else "never"
        return "first" if scheme == "first" else "never" if scheme == "never" else "always"
    return "never"


def refuse_unless_exact(layout: Mapping[str, Any]) -> None:
    """`TokenizerError` if texts would not come back from the tokens of this tokenizer.json of SentencePiece's kind."""
    model = layout["model"]
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"is a {model['type']} vocabulary of SentencePiece; of its kinds only BPE is read")
    if not isinstance(model["vocab"], dict):
        raise TokenizerError("damaged: its vocabulary gives no ids; fetch it again")
    changing = [part.get("type") for part in parts(layout.get("normalizer")) if part not in (_TO_SPACE, _PREPEND)]
    changing += [part.get("type") for part in parts(layout.get("pre_tokenizer")) if not _keeps(part)]
    if changing:
        raise TokenizerError(f"changes texts before it cuts them ({changing[0]}), so that they would not come back")
    odd = [key for key in ("ignore_merges", "dropout", *_AFFIXES) if model.get(key)]
    if odd:
        raise TokenizerError(f"sets {odd[0]} of a vocabulary of SentencePiece, which has no such thing")
    if not model.get("byte_fallback") or not {*NEEDED, SPACE} <= model["vocab"].keys():
        raise TokenizerError("has no tokens for single bytes and spaces, so that some texts would not come back")
    if any(left + right in BYTES for left, right in map(_pair, model.get("merges") or ())):
        raise TokenizerError("puts tokens of bytes together out of text, which would not come back")


_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")


def _is_metaspace(part: Mapping[str, Any]) -> bool:
    return bool(part.get("type") == "Metaspace" and part.get("replacement") == SPACE)


def _keeps(part: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer only cuts."""
    if part.get("type") in ("Split", "Punctuation"):
        return bool(part.get("behavior", "Isolated") != "Removed")
    return _is_metaspace(part) or part.get("type") == "Digits"


def within(layout: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer.json that cuts a text as this one does, but puts no space before it."""
    cuts = [part for part in parts(layout.get("pre_tokenizer")) if not _is_metaspace(part)]
    if any(_is_metaspace(part) and part.get("split", True) for part in parts(layout.get("pre_tokenizer"))):
        cuts.append({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": True})
    return {
        **layout,
        "normalizer": _TO_SPACE,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts} if cuts else None,
        "post_processor": None,
        "decoder": None,
    }


def spell(piece: str) -> bytes:
    """The bytes that a piece stands for."""
    return bytes((BYTES[piece],)) if piece in BYTES else piece.replace(SPACE, " ").encode()


def layout_of(pieces: Sequence[Piece], opening: Opening) -> dict[str, Any]:
    """The tokenizer.json of a vocabulary, spelled as the published ones are. `TokenizerError` for an absurd piece."""
    added = [
        {"id": i, "content": piece.text, **ADDED, "normalized": SPACE in piece.text, "special": is_special}
        for i, piece in enumerate(pieces)
        if (is_special := piece.kind in (Kind.CONTROL, Kind.UNKNOWN))
        or (piece.kind == Kind.USER_DEFINED and " " not in piece.text)  # no text holds a space when it is cut
    ]
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    replaced = {"type": "Sequence", "normalizers": [_PREPEND, _TO_SPACE]} if opening == "always" else _TO_SPACE
    last = () if opening == "never" else (_WITHOUT_FIRST,)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None if opening == "first" else replaced,
        "pre_tokenizer": metaspace if opening == "first" else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [_FROM_SPACE, *_FROM_BYTES, *last]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next((piece.text for piece in pieces if piece.kind == Kind.UNKNOWN), None),
            **dict.fromkeys(_AFFIXES),
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: i for i, piece in enumerate(pieces) if piece.kind != Kind.UNUSED},
            "merges": [[left, right] for left, right in merges_of(pieces)],
        },
    }


def merges_of(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Every way to put an ordinary piece together out of two, in the order in which it is done.

    Where pieces have the same score, the program takes what stands first in the text, which no list can say; the order
    here, that of `transformers`, joins the longest left part first. `TokenizerError` for a piece of absurd length.
    """
    scores = {piece.text: piece.score for piece in pieces if piece.kind == Kind.NORMAL}
    longest, total = max(map(len, scores), default=0), sum(map(len, scores))
    if longest > MAX_PIECE_CHARS or total > MAX_CHARS:
        raise TokenizerError(
            f"has pieces of up to {longest:,} and together {total:,} characters, as no vocabulary does; fetch it again"
        )
    found = [
        (score, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def scores_of(layout: Mapping[str, Any]) -> tuple[dict[str, float], bool]:
    """(a score for every ordinary piece of a tokenizer.json, whether the scores alone say how it puts pieces together).

    They do where its merges came from scores; a vocabulary that was learned as merges may join pieces in ways that no
    score forbids.
    """
    model = layout["model"]
    added = {token["content"] for token in layout["added_tokens"]}
    ordinary = {piece: i for piece, i in model["vocab"].items() if piece not in added and piece not in BYTES}
    merges = [(left, right) for left, right in map(_pair, model["merges"]) if left + right in ordinary]
    merges = [merge for merge in merges if ordinary.keys() >= set(merge)]
    rank = {piece: place for place, piece in enumerate(dict.fromkeys(map("".join, merges)))}
    scores = {piece: -float(rank.get(piece, len(rank))) for piece in sorted(ordinary, key=ordinary.__getitem__)}
    told = merges_of([Piece(piece, score) for piece, score in scores.items()])
    is_exact = _in_turn(told) == _in_turn(merges) and sorted(told) == sorted(merges)
    return scores, is_exact


def _in_turn(merges: Sequence[tuple[str, str]]) -> list[str]:
    return [piece for piece, _ in groupby(map("".join, merges))]


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
