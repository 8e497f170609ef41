"""Small vocabularies as SentencePiece learns them, and its own reading of texts, for tests of several folders."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest

from fledge.text.published import PublishedTokenizer, adopt_published
from fledge.text.sentencepiece import Kind, Opening, Piece, layout_of
from fledge.text.tokenizer import Tokenizer

SENTENCES = (
    "The committee met on 12 May 1998 and wasn't able to agree. It met again, and again it wasn't able to agree.",
    "def area(width, height):\n    if width < 0:\n        raise ValueError('width')\n    return width * height\n",
    "今天天气很好，我们去公园散步。明天天气不好，我们在家看书。学习语言需要时间，学习数学也需要时间。",
    "[INST] a bird flies out of the nest [/INST] and the nest is empty",
)
TEXTS = (
    *SENTENCES,
    "",
    "a",
    " a",
    "   ",
    "  two  spaces   and a tab\t\there \n\n  end  ",
    "\n",
    "\r\n\x00",
    "今天天气 🐦🐦 naïve café e\u0301 Ωμέγα مرحبا\u3000\u00a0x",
    "<s> </s> <unk> <0x0A> <0xE4> [INST][/INST]",
    "=" * 19 + " " * 13 + "a" * 17,
)
# As Llama 2's makers wrote it, but for the system's message.
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' '  + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@functools.cache
def model(**options: Any) -> bytes:
    """A tokenizer.model; `options` are of SentencePiece's trainer."""
    library = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(SENTENCES * 4).split("\n")),
        model_writer=written,
        minloglevel=2,
        num_threads=1,
        **{
            "model_type": "bpe",
            "vocab_size": 500,
            "hard_vocab_limit": False,
            "byte_fallback": True,
            "character_coverage": 0.98,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in options.items()},
        },
    )
    return written.getvalue()


def their_ids(data: bytes, text: str) -> list[int]:
    library = pytest.importorskip("sentencepiece")
    return list(library.SentencePieceProcessor(model_proto=data).encode(text))


WORDS = (
    "IN",
    "ST",
    "▁a",
    "▁b",
    "ir",
    "▁bir",
    "▁bird",
    "in",
    "▁in",
    "st",
    "INST",
    "▁n",
    "▁ne",
    "▁nest",
    "▁[",
    "▁▁",
    "▁▁▁▁",
)


def pieces(*more: Piece) -> list[Piece]:
    """A vocabulary by hand, for where nothing is to be learned: 3 special tokens, 256 bytes, words, `more`, letters.
    Of the words those that come earlier are put together first."""
    special = [Piece("<unk>", 0.0, Kind.UNKNOWN), Piece("<s>", 0.0, Kind.CONTROL), Piece("</s>", 0.0, Kind.CONTROL)]
    single = [Piece(f"<0x{byte:02X}>", 0.0, Kind.BYTE) for byte in range(256)]
    words = [Piece(word, -float(place)) for place, word in enumerate(WORDS)]
    letters = "▁abcdefghijklmnopqrstuvwxyzINST[]/.,?!:"
    return [*special, *single, *words, *more, *(Piece(letter, -100.0 - i) for i, letter in enumerate(letters))]


def published(
    opening: Opening = "always", template: str | None = LLAMA2, *, of: tuple[Piece, ...] = ()
) -> PublishedTokenizer:
    data = json.dumps(layout_of(pieces(*of), opening), ensure_ascii=False).encode()
    return PublishedTokenizer(data, "<s>", ("</s>",), None, True, template)


def tokenizer(opening: Opening = "always") -> Tokenizer:
    return adopt_published(published(opening), len(pieces()))[0]


def directory(folder: Path, data: bytes, **settings: Any) -> Path:
    """What a maker publishes beside the weights: tokenizer.model and settings."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
