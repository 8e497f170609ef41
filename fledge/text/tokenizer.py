"""Text <-> ids. `Tokenizer` wraps the `tokenizers` library; `StreamDecoder` turns ids into text as they come.

Layer 2. Three promises on top of the library's: text never becomes a special token, whatever it says; every token
has exact bytes, so that decoding gives back every Unicode text; and a tokenizer is known by the hash of its file.
Some tokenizers (text/sentencepiece.py) put a space before a text that is not its own: whoever encodes or decodes what
stands `within` a text, behind other tokens of it, says so. To all others that makes no difference.
Vocabularies are learned in text/subwords.py; files of other makers are adopted in text/foreign.py.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers as library

from fledge.errors import TokenizerError
from fledge.files import write_file
from fledge.text import sentencepiece
from fledge.text.foreign import adopt, load_core, parse, refuse_unless_exact
from fledge.text.subwords import (
    NAMED_SPECIAL_TOKENS,
    REQUIRED_SPECIAL_TOKENS,
    SPECIAL_TOKENS,
    TokenizerConfig,
    byte_alphabet,
    refuse_half_characters,
    train_subwords,
)

__all__ = [
    "NAMED_SPECIAL_TOKENS",
    "SPECIAL_TOKENS",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "train_tokenizer",
]

# Special tokens of some published models that belong to what is said: with them the assistant calls tools. Text never
# becomes one of them either, but they have bytes, so that a call can be read from an answer's text (text/tools.py).
SPOKEN_TOKENS = ("<tool_call>", "</tool_call>")
CHARS_PER_CALL = 1_000_000  # the library holds about a hundred bytes a token while it works


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Learn a tokenizer from texts. The same texts in the same order give the same file, byte for byte.

    Raises `TokenizerError` if there is no text or a text holds a lone surrogate.
    """
    return Tokenizer(train_subwords(texts, config))


class Tokenizer:
    """A vocabulary with fledge's special tokens. Built from the bytes of a tokenizer.json, which `save` writes back.

    `vocab_size` counts every id, `hash` is the sha256 of the file. `spoken_ids` are its special tokens among
    `SPOKEN_TOKENS`, by name; `framing_ids` all other special ones: they stand around texts and say nothing. `opening`
    says where a space stands that is no text's own, None for a vocabulary that is not SentencePiece's. Raises
    `TokenizerError` if the file is damaged, does not work on bytes, lacks one of `REQUIRED_SPECIAL_TOKENS`, or gives
    both one id.
    """

    def __init__(self, data: bytes) -> None:
        layout = parse(data)
        refuse_unless_exact(layout)
        self._data = data
        is_spaced = sentencepiece.is_sentencepiece(layout)
        self.opening = sentencepiece.opening_of(layout) if is_spaced else None
        self._core = load_core(json.dumps(sentencepiece.within(layout)).encode() if is_spaced else data)
        self._core.encode_special_tokens = True  # names of special tokens in a text are ordinary text
        self._special_ids = {token["content"]: token["id"] for token in layout["added_tokens"] if token["special"]}
        _refuse_missing(self._special_ids)
        self._bytes = _token_bytes(self._core, layout, is_spaced)
        ids = self._core.get_vocab(with_added_tokens=False) if is_spaced else {}
        # The letter that spells a space is one as well, and only bytes spell it: none where it is a letter like others.
        self._spaces = [ids[f"<0x{byte:02X}>"] for byte in sentencepiece.SPACE.encode()] if is_spaced else []
        self._never = frozenset(self._special_ids.values())
        self.spoken_ids = {name: self._special_ids[name] for name in SPOKEN_TOKENS if name in self._special_ids}
        self.framing_ids = self._never - frozenset(self.spoken_ids.values())
        self.vocab_size = len(self._bytes)
        self.hash = hashlib.sha256(data).hexdigest()
        self.pad_id = self.special_id("<|pad|>")
        self.end_of_text_id = self.special_id("<|endoftext|>")

    @classmethod
    def load(cls, path: Path | str, *, special_tokens: Mapping[str, str | None] | None = None) -> Tokenizer:
        """Read a tokenizer.json. For a file of another maker `special_tokens` says which of its tokens are ours.

        It maps names of `NAMED_SPECIAL_TOKENS` to the file's own, or to None where a token is to be added after the
        file's vocabulary (`foreign.adopt`). Raises `TokenizerError`, naming the file.
        """
        try:
            data = Path(path).read_bytes()
            return cls(data if special_tokens is None else adopt(data, special_tokens))
        except OSError as error:
            raise TokenizerError(
                f"{path}: cannot be read ({error.strerror}); give the path of a tokenizer.json"
            ) from error
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def save(self, path: Path | str) -> None:
        """Write the tokenizer.json, whole or not at all."""
        write_file(Path(path), lambda temporary: temporary.write_bytes(self._data))

    def special_id(self, name: str) -> int:
        """The id of a special token by its name; `TokenizerError` if there is none of that name."""
        if name not in self._special_ids:
            raise TokenizerError(f"no special token '{name}'; known are {', '.join(self._special_ids)}")
        return int(self._special_ids[name])

    @property
    def special_ids(self) -> frozenset[int]:
        """All ids that text never becomes. `decode` drops them, but for the `spoken_ids`."""
        return self._never

    def has_tokens_of(self, other: Tokenizer) -> bool:
        """Whether every id means the same to both, however they cut texts into tokens."""
        return self._bytes == other._bytes and self._special_ids == other._special_ids

    def encode(self, text: str, *, within: bool = False) -> list[int]:
        """The ids of a text, never a special one. `TokenizerError` if it holds a lone surrogate."""
        refuse_half_characters(text)
        text = text if within else self._opened(text)
        ids: list[int] = self._core.encode(text, add_special_tokens=False).ids
        return ids if self._is_plain(text, ids) else self._encode_cut(text)

    def encode_spoken(self, text: str) -> list[int]:
        """As `encode` within a text, but names of `spoken_ids` become these: for text that is ours, never a user's."""
        if not self.spoken_ids:
            return self.encode(text, within=True)
        parts = re.split("(" + "|".join(map(re.escape, self.spoken_ids)) + ")", text)
        spoken = self.spoken_ids
        return [i for part in parts for i in ([spoken[part]] if part in spoken else self.encode(part, within=True))]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores; the results stand in the order of the texts."""
        encoded: list[list[int]] = []
        for some in _portions(texts):
            for text in some:
                refuse_half_characters(text)
            opened = [self._opened(text) for text in some]
            found = [e.ids for e in self._core.encode_batch_fast(opened, add_special_tokens=False)]
            encoded += [
                ids if self._is_plain(text, ids) else self._encode_cut(text)
                for ids, text in zip(found, opened, strict=True)
            ]
        return encoded

    def decode(self, ids: Iterable[int], *, within: bool = False) -> str:
        """The text of ids, framing tokens dropped; bytes that are no UTF-8 become U+FFFD."""
        spelled = Spelled(self, within)
        return b"".join(map(spelled.push, ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes a token stands for, none for one that frames. `TokenizerError` if there is no such id."""
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"no token has the id {token_id}; ids go from 0 to {self.vocab_size - 1}")
        return self._bytes[token_id]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """One readable string a token, for showing: special tokens by name, half characters as \\xNN."""
        names = {token_id: name for name, token_id in self._special_ids.items()}
        return [names.get(i) or self.token_bytes(i).decode(errors="backslashreplace") for i in ids]

    def _opened(self, text: str) -> str:
        return f" {text}" if text and self.opening in ("always", "first") else text

    def _is_plain(self, text: str, ids: Sequence[int]) -> bool:
        return self._never.isdisjoint(ids) and not (self._spaces and sentencepiece.SPACE in text)

    def _encode_cut(self, text: str) -> list[int]:
        """Encode a text that names a special token where the vocabulary itself would spell that token (some foreign
        files), or holds the letter that stands for a space: every such name is cut after its first character, that
        letter is spelled in bytes, and the parts are encoded apart."""
        if self._spaces and sentencepiece.SPACE in text:
            parts = text.split(sentencepiece.SPACE)
            encoded = self._core.encode_batch_fast(parts, add_special_tokens=False)
            plain = [
                e.ids if self._never.isdisjoint(e.ids) else self._encode_cut(part)
                for part, e in zip(parts, encoded, strict=True)
            ]
            return plain[0] + [i for ids in plain[1:] for i in (*self._spaces, *ids)]
        names = re.compile("|".join(re.escape(name) for name in self._special_ids if name))
        cuts = [0, *(match.start() + 1 for match in names.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
        ids: list[int] = [i for part in parts for i in self._core.encode(part, add_special_tokens=False).ids]
        if not self._never.isdisjoint(ids):
            raise TokenizerError("this tokenizer spells ordinary text with a special token; it cannot be used safely")
        return ids


class Spelled:
    """The bytes of ids one by one, without the spaces that the tokenizer puts before texts."""

    def __init__(self, tokenizer: Tokenizer, within: bool) -> None:
        self._tokenizer, self._within = tokenizer, within
        self.restart()

    def restart(self) -> None:
        self._is_opening = self._tokenizer.opening in ("always", "first") and not self._within

    def push(self, token_id: int) -> bytes:
        """What this token adds. `TokenizerError` if there is no such id."""
        tokenizer = self._tokenizer
        data = tokenizer.token_bytes(token_id)
        if tokenizer.opening in (None, "never"):
            return data
        if token_id in tokenizer.framing_ids:
            self._is_opening = tokenizer.opening == "always" or token_id == tokenizer.end_of_text_id
        elif self._is_opening and data:
            self._is_opening = False
            return data.removeprefix(b" ")
        return data


class StreamDecoder:
    """Turns ids into text as they come, holding back what may be half a character.

    What `push` and the final `flush` return, joined, is what `Tokenizer.decode` makes of the same ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, within: bool = False) -> None:
        self._spelled = Spelled(tokenizer, within)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""
        return self._decoder.decode(self._spelled.push(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the ids ended within a character, else nothing. Then it starts anew."""
        self._spelled.restart()
        return self._decoder.decode(b"", final=True)


def _refuse_missing(special_ids: Mapping[str, int]) -> None:
    missing = [name for name in REQUIRED_SPECIAL_TOKENS if name not in special_ids]
    if missing:
        raise TokenizerError(
            f"lacks the special tokens {', '.join(missing)}; with special_tokens={{name: token}} say which of the "
            f"file's ({', '.join(special_ids) or 'none'}) they are, or None for one to be added"
        )
    if special_ids["<|pad|>"] == special_ids["<|endoftext|>"]:
        raise TokenizerError("padding and end of text are one token; padding needs an id of its own")


def _token_bytes(core: library.Tokenizer, layout: Mapping[str, Any], is_spaced: bool) -> tuple[bytes, ...]:
    """The bytes of every id. Ids that a foreign file leaves unused have none."""
    byte_of = {char: byte for byte, char in byte_alphabet().items()}
    added = {}
    for token in layout["added_tokens"]:
        name = token["content"]
        said = name.replace(sentencepiece.SPACE, " ") if is_spaced else name
        added[token["id"]] = b"" if token["special"] and name not in SPOKEN_TOKENS else said.encode()
    prefix = layout["model"].get("continuing_subword_prefix") or ""
    vocab = {token_id: token for token, token_id in core.get_vocab(with_added_tokens=False).items()}
    table = []
    for token_id in range(max((*added, *vocab)) + 1):
        token = vocab.get(token_id, "").removeprefix(prefix)
        try:
            spelled = added.get(token_id)
            if spelled is None:
                spelled = sentencepiece.spell(token) if is_spaced else bytes(byte_of[char] for char in token)
            table.append(spelled)
        except KeyError as error:
            raise TokenizerError(
                f"token {token_id} ({token!r}) is not spelled in bytes; only byte-level files are read"
            ) from error
    return tuple(table)


def _portions(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in order, in stretches of about `CHARS_PER_CALL` characters."""
    start, size = 0, 0
    for end, text in enumerate(texts, start=1):
        size += len(text)
        if size >= CHARS_PER_CALL or end == len(texts):
            yield texts[start:end]
            start, size = end, 0
