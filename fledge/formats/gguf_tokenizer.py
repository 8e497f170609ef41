"""The vocabulary inside a GGUF file <-> a tokenizer.json, with its chat template and special tokens.

Two kinds are known (`tokenizer.ggml.model`): byte-level BPE, "gpt2", and SentencePiece's BPE, "llama". For the first
the file names the rule that cuts text into words (`tokenizer.ggml.pre`) and does not hold it; the rules here are those
of llama.cpp (src/llama-vocab.cpp) in the spelling of the tokenizer.json files that the models' makers published. The
second holds pieces with scores (text/sentencepiece.py), and cuts no words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fledge.errors import CheckpointError, TokenizerError
from fledge.formats.gguf import FLOAT32, INT32, GGUFFile, Typed
from fledge.text.foreign import MARKER, parse
from fledge.text.published import PublishedTokenizer
from fledge.text.sentencepiece import BYTES, SPACE, Kind, Piece, is_sentencepiece, layout_of, opening_of, scores_of

NORMAL, CONTROL, USER_DEFINED, UNUSED = map(int, (Kind.NORMAL, Kind.CONTROL, Kind.USER_DEFINED, Kind.UNUSED))
_KEY = "tokenizer.ggml."
_USUAL_IDS = {"bos": 1, "eos": 2}  # of SentencePiece's models; llama.cpp assumes them where a file says nothing

_BYTES: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
_GPT2 = {**_BYTES, "use_regex": True}
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_BPE: dict[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SPACES}"
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@dataclass(frozen=True)
class Rule:
    """How text becomes words. `names` are llama.cpp's; the first is written. `words` come before bytes."""

    names: tuple[str, ...]
    words: tuple[dict[str, Any], ...]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False


RULES = (
    Rule(("gpt-2", "phi-2", "gpt2", "jina-v2-de", "jina-v2-es"), (_GPT2,)),
    Rule(("default",), (*map(_split, _DEFAULT), _BYTES)),
    Rule(
        ("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"),
        (_split(_LLAMA3), _BYTES),
        ignore_merges=True,
    ),
    Rule(("qwen2", "deepseek-r1-qwen", "megrez"), (_split(_QWEN2), _BYTES), {"type": "NFC"}),
    Rule(("smollm", "starcoder", "refact"), ({"type": "Digits", "individual_digits": True}, _GPT2)),
)


def read_tokenizer(file: GGUFFile) -> PublishedTokenizer:
    """The tokenizer of a file. `CheckpointError` for one that is missing, damaged, or of a kind we do not read."""
    kind = file.get(_KEY + "model", str)
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{file.path}: a tokenizer of kind {kind!r} is not supported: known are byte-level BPE, 'gpt2', and "
            "SentencePiece's BPE, 'llama'"
        )
    rule = _find_rule(file) if kind == "gpt2" else None
    tokens = _strings(file, "tokens")
    types = _types(file, tokens)
    usual = {} if rule else {name: i for name, i in _USUAL_IDS.items() if i < len(tokens)}
    special = {
        name: _token(file, f"{name}_token_id", tokens, types, usual.get(name))
        for name in ("bos", "eos", "eot", "eom", "padding")
    }
    kept = (Kind.UNKNOWN,) if rule is None else ()  # which serves as padding, too
    types = [
        CONTROL if token in special.values() and kind_of_token not in kept else kind_of_token
        for token, kind_of_token in zip(tokens, types, strict=True)
    ]
    layout = _of_pieces(file, tokens, types) if rule is None else _of_words(file, rule, tokens, types)
    ends = [special[name] for name in ("eos", "eot", "eom")]
    return PublishedTokenizer(
        json.dumps(layout, ensure_ascii=False).encode(),
        special["bos"],
        tuple(end for end in ends if end is not None),
        special["padding"],
        special["bos"] is not None
        and file.get(_KEY + "add_bos_token", bool, True if rule is None else rule.ignore_merges),
        file.get("tokenizer.chat_template", str),
    )


def _of_words(file: GGUFFile, rule: Rule, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    added = [
        {"id": token_id, "content": token, **_ADDED, "special": kind == CONTROL}
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    layout = {**_layout(rule), "added_tokens": added}
    layout["model"] |= {
        "vocab": {token: i for i, token in enumerate(tokens) if types[i] != UNUSED},
        "merges": [_pair(file, merge) for merge in _strings(file, "merges")],
    }
    return layout


def _of_pieces(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """llama.cpp puts a space after every special token, too."""
    scores = file.metadata.get(_KEY + "scores")
    is_array = isinstance(scores, np.ndarray) and scores.dtype.kind == "f"
    if scores is None or not is_array or len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise CheckpointError(f"{file.path}: {_KEY}scores must hold a number for each of the {len(tokens)} tokens")
    if not set(types) <= set(Kind):
        raise CheckpointError(f"{file.path}: {_KEY}token_type must hold numbers from 1 to {max(Kind)}")
    named = set(tokens)
    tokens = [  # user-defined ones have spaces of their own in these files
        spaced if kind == USER_DEFINED and (spaced := token.replace(" ", SPACE)) not in named else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    pieces = [Piece(*piece) for piece in zip(tokens, map(float, scores), types, strict=True)]
    try:
        return layout_of(pieces, "always" if file.get(_KEY + "add_space_prefix", bool, True) else "never")
    except TokenizerError as error:
        raise CheckpointError(f"{file.path}: its vocabulary {error}") from error


def tokenizer_metadata(published: PublishedTokenizer, vocab_size: int) -> tuple[dict[str, Any], bool]:
    """(the metadata of a tokenizer for a model of `vocab_size` rows, whether llama.cpp will cut every text as here).

    llama.cpp knows rules by name only: a tokenizer of another rule gets GPT-2's, and then some texts become other
    tokens than here, which still spell the same text. So do those of SentencePiece's kind whose merges came from no
    scores. `CheckpointError` if it is no BPE.
    """
    layout = parse(published.data)
    if layout["model"].get("type") != "BPE":
        raise CheckpointError(f"a {layout['model'].get('type')} vocabulary has no place in a GGUF file; only BPE has")
    added = {token["id"]: token for token in layout["added_tokens"]}
    names = {token_id: token for token, token_id in layout["model"]["vocab"].items()}
    names |= {token_id: token["content"] for token_id, token in added.items()}
    if max(names) >= vocab_size:
        raise CheckpointError(f"the tokenizer has {max(names) + 1} tokens, the model {vocab_size} rows: no pair")
    types = {token_id: CONTROL if token["special"] else USER_DEFINED for token_id, token in added.items()}
    tokens = [names.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size)]
    kinds = [types.get(i, NORMAL if i in names else UNUSED) for i in range(vocab_size)]
    ids = {token: token_id for token_id, token in names.items()}
    cutting, is_exact = (_scored if is_sentencepiece(layout) else _ruled)(layout, tokens, kinds)
    ends = zip(("eos", "eot", "eom"), published.ends, strict=False)
    special = {"bos": published.bos, "padding": published.pad, **dict(ends)}
    found = {
        "tokens": tokens,
        **cutting,
        "add_bos_token": published.begins,
        **{f"{name}_token_id": ids[token] for name, token in special.items() if token is not None},
    }
    metadata = {_KEY + name: value for name, value in found.items()}
    if published.template is not None:
        metadata["tokenizer.chat_template"] = published.template
    return metadata, is_exact


def _ruled(layout: Mapping[str, Any], _: Sequence[str], kinds: Sequence[int]) -> tuple[dict[str, Any], bool]:
    """How byte-level BPE cuts texts, and whether its own rule for words has a name."""
    rule = next((rule for rule in RULES if _shape(_layout(rule)) == _shape(layout)), None)
    return {
        "model": "gpt2",
        "pre": (rule or RULES[0]).names[0],
        "token_type": Typed(INT32, kinds),
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in layout["model"]["merges"]],
        "add_space_prefix": False,
    }, rule is not None


def _scored(layout: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> tuple[dict[str, Any], bool]:
    """How SentencePiece's BPE cuts texts, and whether scores say it all."""
    scores, is_exact = scores_of(layout)
    unknown = layout["model"].get("unk_token")
    numbers = [
        Kind.BYTE if token in BYTES and kind == NORMAL else kind for token, kind in zip(tokens, kinds, strict=True)
    ]
    found: dict[str, Any] = {
        "model": "llama",
        "tokens": [
            token.replace(SPACE, " ") if kind == USER_DEFINED else token
            for token, kind in zip(tokens, kinds, strict=True)
        ],
        "pre": "default",
        "scores": Typed(FLOAT32, [scores.get(token, 0.0) for token in tokens]),
        "add_space_prefix": opening_of(layout) != "never",
        "add_eos_token": False,
    }
    if unknown in tokens:
        found["unknown_token_id"] = tokens.index(unknown)
        numbers[tokens.index(unknown)] = Kind.UNKNOWN
    return {**found, "token_type": Typed(INT32, [int(number) for number in numbers])}, is_exact


def _shape(layout: Mapping[str, Any]) -> list[Any]:
    """How a tokenizer.json cuts text, in one spelling: defaults filled in, what changes no id left out."""
    words = layout.get("pre_tokenizer") or {}
    parts = words.get("pretokenizers", [words])
    plain = [{key: value for key, value in part.items() if key not in ("trim_offsets", "invert")} for part in parts]
    filled = [{"use_regex": True, **part} if part.get("type") == "ByteLevel" else part for part in plain]
    return [layout.get("normalizer"), filled, bool(layout["model"].get("ignore_merges"))]


def _layout(rule: Rule) -> dict[str, Any]:
    words = rule.words[0] if len(rule.words) == 1 else {"type": "Sequence", "pretokenizers": list(rule.words)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": rule.normalizer,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": _BYTES,
        "model": {**_BPE, "ignore_merges": rule.ignore_merges},
    }


def _find_rule(file: GGUFFile) -> Rule:
    name = file.get(_KEY + "pre", str, "default")
    for rule in RULES:
        if name in rule.names:
            return rule
    known = ", ".join(name for rule in RULES for name in rule.names)
    raise CheckpointError(f"{file.path}: {_KEY}pre {name!r} is not supported: known are {known}")


def _strings(file: GGUFFile, name: str) -> Sequence[str]:
    found = file.get(_KEY + name, list)
    if found is None or (name == "tokens" and (not found or len(set(found)) < len(found))):
        raise CheckpointError(f"{file.path}: {_KEY}{name} must hold strings, each token once; fetch the file again")
    return found  # type: ignore[no-any-return]


def _types(file: GGUFFile, tokens: Sequence[str]) -> list[int]:
    found = file.metadata.get(_KEY + "token_type")
    if found is None:
        return [NORMAL] * len(tokens)
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or len(found) != len(tokens):
        raise CheckpointError(f"{file.path}: {_KEY}token_type must hold a number for each of the {len(tokens)} tokens")
    return [int(number) for number in found]


def _token(file: GGUFFile, name: str, tokens: Sequence[str], types: Sequence[int], usual: int | None) -> str | None:
    """The token whose id stands there, or is `usual` without one; None too if it is one of ordinary text: a default
    that nobody set right."""
    token_id = file.get(_KEY + name, int, usual)
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        raise CheckpointError(f"{file.path}: {_KEY}{name} {token_id} is outside the {len(tokens)} tokens")
    is_apart = types[token_id] in (CONTROL, USER_DEFINED) or MARKER.fullmatch(tokens[token_id])
    return tokens[token_id] if is_apart else None


def _pair(file: GGUFFile, merge: str) -> list[str]:
    parts = merge.split(" ")
    if len(parts) != 2:
        raise CheckpointError(f"{file.path}: {_KEY}merges holds {merge!r}, which is no pair; fetch the file again")
    return parts
