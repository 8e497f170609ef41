"""Tokenizer files of other makers: what fledge needs of them, and how they get its special tokens.

Layer 2, beneath text/tokenizer.py. Only files of byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM and their like) and of
SentencePiece's BPE (text/sentencepiece.py) are read, because only they give back every text. Special tokens are adopted
by name: since text never becomes one, a special token's name is a mere label, and renaming it in the file leaves every
id, and so every weight, where it was.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import tokenizers as library
from tokenizers import decoders, models, pre_tokenizers

from fledge.errors import TokenizerError
from fledge.text import sentencepiece
from fledge.text.sentencepiece import parts
from fledge.text.subwords import NAMED_SPECIAL_TOKENS, REQUIRED_SPECIAL_TOKENS, byte_alphabet

NEW_PAD = "<|fledge_pad|>"  # the published name of padding that no published token serves as
BYTES_OUTSIDE_UTF8 = (
    0xFF,
    0xFE,
    0xFD,
    0xFC,
    0xFB,
    0xFA,
    0xF9,
    0xF8,
    0xF7,
    0xF6,
    0xF5,
    0xC1,
    0xC0,
)  # RFC 3629
# What stands between texts looks like this: <|im_end|>, </s>, [INST]. No word does, and no white space.
MARKER = re.compile(r"<\S+>|\[\S+\]")
_PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def parse(data: bytes) -> dict[str, Any]:
    """The content of a tokenizer.json with at least its model and added tokens; `TokenizerError` if it is none."""
    try:
        layout = json.loads(data)
        if _is_vocabulary(layout["model"]) and all(map(_is_added_token, layout["added_tokens"])):
            _refuse_broken_merges(layout["model"])
            return dict(layout)
    except TokenizerError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise TokenizerError("not a tokenizer.json, or a damaged one; get or make the file again")


def _is_vocabulary(model: Mapping[str, Any]) -> bool:
    """Ids by token, or as Unigram has it a list of tokens and scores."""
    vocab = model["vocab"]
    return isinstance(vocab, list) or all(type(token_id) is int for token_id in vocab.values())


def _is_added_token(token: Mapping[str, Any]) -> bool:
    return type(token["id"]) is int and isinstance(token["content"], str) and isinstance(token["special"], bool)


def _refuse_broken_merges(model: Mapping[str, Any]) -> None:
    """`TokenizerError` for a merge of tokens that the vocabulary lacks: the library would panic."""
    vocab, prefix = model["vocab"], model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges") or ():
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not (left in vocab and right in vocab and left + right.removeprefix(prefix) in vocab):
            raise TokenizerError(f"damaged: merges '{left}' and '{right}', which its vocabulary lacks; fetch it again")


def load_core(data: bytes) -> library.Tokenizer:
    """The library's tokenizer of a tokenizer.json, without padding or truncation; `TokenizerError` if it reads none."""
    try:
        core = library.Tokenizer.from_str(data.decode())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exception for whatever the library cannot read, and its panics are none
        raise TokenizerError(f"not a tokenizer.json that can be read ({error}); get or make the file again") from error
    core.no_padding()
    core.no_truncation()
    return core


def refuse_unless_exact(layout: Mapping[str, Any]) -> None:
    """`TokenizerError` unless every text comes back from its tokens: they are made of bytes, or of SentencePiece's."""
    if sentencepiece.is_sentencepiece(layout):
        return sentencepiece.refuse_unless_exact(layout)
    found = [part for key in ("pre_tokenizer", "normalizer") for part in parts(layout.get(key))]
    byte_level = [part for part in found if part.get("type") == "ByteLevel"]
    if not byte_level:
        kinds = ", ".join(str(part.get("type")) for part in found) or "nothing"
        raise TokenizerError(
            f"does not work on bytes (it splits by {kinds}); only byte-level files and SentencePiece's BPE are read"
        )
    if any(part.get("add_prefix_space") for part in byte_level):
        raise TokenizerError(
            "puts a space before every text, which then does not come back; set add_prefix_space to false"
        )
    if layout["model"].get("end_of_word_suffix"):
        raise TokenizerError(
            "marks the ends of words, so its tokens have no exact bytes; only byte-level files are read"
        )
    return None


def adopt(data: bytes, special_tokens: Mapping[str, str | None]) -> bytes:
    """A tokenizer.json that is `data` with fledge's names for its special tokens.

    `special_tokens` maps names of `NAMED_SPECIAL_TOKENS` to tokens of the file, or to None for a token to be added
    after the file's vocabulary; a name that is not mentioned must be in the file already. Ids do not change. Raises
    `TokenizerError` for a name that is not ours, a token that the file lacks, and a token that is to be two of ours.
    """
    layout = parse(data)
    added = {token["content"]: token for token in layout["added_tokens"]}
    _refuse_wrong_mapping(special_tokens, added)
    for name, token in special_tokens.items():
        if token is not None:
            added[token].update(content=name, special=True, normalized=False)
            _rename(layout, token, name)
    core = load_core(json.dumps(layout).encode())
    new = [name for name, token in special_tokens.items() if token is None]
    core.add_special_tokens([library.AddedToken(name, special=True, normalized=False) for name in new])
    return core.to_str(pretty=False).encode()


def adopt_imported(
    data: bytes, vocab_size: int, document: str, pad: str | None, used: Collection[str] = ()
) -> tuple[bytes, dict[str, str]]:
    """(a tokenizer.json for a model of `vocab_size` rows, our names of the tokens that it calls otherwise by theirs).

    `document`, the token that begins a document, becomes `<|endoftext|>`. `pad` becomes `<|pad|>` unless it is that
    token or one of those `used` for something else, or the file lacks it: then padding gets an id of its own that
    nothing else uses. That is a row of the model that has no token, or the token of a byte that no text holds, or an
    unused special token. All that are `used` become special ones, whatever the file says. No id changes.
    `TokenizerError` if the file lacks a token, has ids beyond the model's rows, or leaves nothing to pad with.
    """
    layout = parse(data)
    vocab, added = layout["model"]["vocab"], layout["added_tokens"]
    if not isinstance(vocab, dict):
        raise TokenizerError(f"is a {layout['model'].get('type')} vocabulary; only BPE is imported")
    ids: dict[str, int] = {**vocab, **{token["content"]: token["id"] for token in added}}
    _refuse_other_models(ids, vocab_size)
    if pad is None or pad == document or pad in used or pad not in ids:
        pad = _unused(layout, ids, vocab_size, {document, *used})
    if pad not in ids:
        ids[pad] = max(set(range(vocab_size)) - set(ids.values()))
    moved = {document: "<|endoftext|>", pad: "<|pad|>"}
    moved |= {name: f"<|published_{name[2:]}" for name in REQUIRED_SPECIAL_TOKENS if name in ids and name not in moved}
    for name in sorted({*moved, *used} - {token["content"] for token in added}):
        if name != pad and not (name in vocab and MARKER.fullmatch(name)):
            raise TokenizerError(f"has no special token '{name}'")
        added.append({"id": ids[name], "content": name, **_PLAIN_TOKEN})
    for token in added:
        token["special"] |= token["content"] in moved or token["content"] in used
        token["content"] = moved.get(token["content"], token["content"])
    layout["model"]["vocab"] = {moved.get(token, token): token_id for token, token_id in ids.items()}
    layout |= {"padding": None, "truncation": None}
    return json.dumps(layout, ensure_ascii=False).encode(), moved


def give_back(data: bytes, names: Mapping[str, str]) -> bytes:
    """The tokenizer.json that `adopt_imported` was given, but for padding and truncation: `names` are what it returned.

    Padding that was a token of no name, or that of a byte, is as it was.
    """
    layout = parse(data)
    theirs = {ours: name for name, ours in names.items()}
    pad = theirs["<|pad|>"]
    was_ours = pad == NEW_PAD
    layout["added_tokens"] = [
        {**token, "content": theirs.get(token["content"], token["content"])}
        for token in layout["added_tokens"]
        if token["content"] != "<|pad|>" or not (was_ours or pad in _unheard_bytes(layout))
    ]
    vocab: Mapping[str, int] = layout["model"]["vocab"]
    layout["model"]["vocab"] = {
        theirs.get(token, token): token_id for token, token_id in vocab.items() if token != "<|pad|>" or not was_ours
    }
    return json.dumps(layout, ensure_ascii=False).encode()


def _refuse_other_models(ids: Mapping[str, int], vocab_size: int) -> None:
    last = max(ids, key=lambda token: ids[token])
    if ids[last] >= vocab_size:
        raise TokenizerError(
            f"has the token '{last}' with id {ids[last]}, but the model has {vocab_size} rows: it is another model's"
        )


def _unused(layout: Mapping[str, Any], ids: Mapping[str, int], vocab_size: int, used: Collection[str]) -> str:
    """A token that text never holds; a new name if a row of the model has no token."""
    if len(set(ids.values())) < vocab_size:
        return NEW_PAD
    letters = {letter for merge in layout["model"].get("merges", ()) for part in merge for letter in part}
    bytes_left = [token for token in _unheard_bytes(layout) if token in ids and token not in letters]
    special = [
        token["content"] for token in layout["added_tokens"] if token["special"] and token["content"] not in used
    ]
    unused = [*bytes_left, *reversed(special)]
    if not unused:
        raise TokenizerError("leaves no id to pad with: every row of the model has a token that is in use")
    return str(unused[0])


def _unheard_bytes(layout: Mapping[str, Any]) -> list[str]:
    """The tokens of the bytes that no text holds."""
    if sentencepiece.is_sentencepiece(layout):
        return [f"<0x{byte:02X}>" for byte in BYTES_OUTSIDE_UTF8]
    return [byte_alphabet()[byte] for byte in BYTES_OUTSIDE_UTF8]


def gpt2_layout(vocab: bytes, merges: bytes) -> bytes:
    """GPT-2's published `encoder.json` and `vocab.bpe` (Radford et al. 2019) as one tokenizer.json."""
    try:
        ids: dict[str, int] = json.loads(vocab)
        lines = [line for line in merges.decode().split("\n") if line and not line.startswith("#version")]
        pairs = [(left, right) for left, right in (line.split(" ") for line in lines)]
        core = library.Tokenizer(models.BPE(vocab=ids, merges=pairs))
    except Exception as error:  # the library raises bare Exception for merges that the vocabulary lacks
        raise TokenizerError(f"not GPT-2's encoder.json and vocab.bpe ({error}); fetch them again") from error
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([library.AddedToken("<|endoftext|>", special=True, normalized=False)])
    return core.to_str(pretty=False).encode()


def _refuse_wrong_mapping(special_tokens: Mapping[str, str | None], added: Mapping[str, Any]) -> None:
    for name, token in special_tokens.items():
        if name not in NAMED_SPECIAL_TOKENS:
            raise TokenizerError(f"'{name}' is no special token of fledge; they are {', '.join(NAMED_SPECIAL_TOKENS)}")
        if token is not None and token not in added:
            raise TokenizerError(f"has no token '{token}' to serve as {name}; it has {', '.join(added) or 'none'}")
        if token != name and name in added:
            raise TokenizerError(f"has a {name} of its own already; leave {name} out of special_tokens")
    twice = [token for token, count in Counter(filter(None, special_tokens.values())).items() if count > 1]
    if twice:
        names = [name for name, token in special_tokens.items() if token == twice[0]]
        raise TokenizerError(f"'{twice[0]}' cannot be {' and '.join(names)} at once; give None for one, to add a token")


def _rename(layout: dict[str, Any], token: str, name: str) -> None:
    """Give a token another name wherever the file's model holds it. Post-processors go: fledge never calls them."""
    vocab = layout["model"]["vocab"]
    if isinstance(vocab, dict) and token in vocab:
        vocab[name] = vocab.pop(token)
    elif isinstance(vocab, list):
        layout["model"]["vocab"] = [[name, score] if piece == token else [piece, score] for piece, score in vocab]
    layout["post_processor"] = None
