"""Training of subword vocabularies: byte-level BPE, WordPiece and Unigram through the `tokenizers` library.

Layer 2, beneath text/tokenizer.py, which gives the result its face. All three work on bytes: text is cut into
words by one pattern, each byte of a word becomes one printable character (the byte alphabet of GPT-2, Radford et al.
2019, section 2.2), and every byte has a token of its own, so there is no unknown token and nothing is lost.
BPE: Sennrich et al. 2016. WordPiece: Schuster & Nakajima 2012. Unigram: Kudo 2018.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

import tokenizers as library
from tokenizers import decoders, models, pre_tokenizers, trainers

from fledge.errors import ConfigError, TokenizerError

Kind = Literal["bpe", "wordpiece", "unigram"]

NUM_RESERVED = 6
NAMED_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
)
REQUIRED_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
)  # of every tokenizer; an imported one may lack the others
SPECIAL_TOKENS = (
    *NAMED_SPECIAL_TOKENS,
    *(f"<|reserved_{i}|>" for i in range(NUM_RESERVED)),
)  # ids from 0, in order

# What a token never spans. The shape is GPT-2's and GPT-4's; the rest is ours and was measured (docs/log.md):
#  - an English contraction is cut off only after a letter, so quoted code ('test') stays whole;
#  - Han runs are cut off from other scripts, which have no spaces to do it;
#  - digits go at most in pairs: a small vocabulary wastes itself on three-digit numbers;
#  - a line break takes the indentation after it along, and code punctuation (`):`, `,`) takes that line break;
#  - every alternative is bounded, so that a word of megabytes costs no more than its length.
_LETTER = r"[\p{L}\p{M}&&[^\p{Han}]]"
_BREAK = r"[\r\n]{1,8}[ \t]{0,64}"
WORD_PATTERN = "|".join(
    (
        r"(?<=\p{L})['’](?i:s|t|d|m|ll|ve|re)(?!\p{L})",
        rf" ?{_LETTER}{{1,48}}",
        r" ?\p{Han}{1,16}",
        r" ?\p{N}{1,2}",
        rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]{{1,24}}(?:(?<=[:,;(){{}}\[\]]){_BREAK})?",
        _BREAK,
        r"\s{1,32}(?!\S)",
        r"\s",
    )
)

MIN_PAIR_COUNT = 2  # a pair seen once is no evidence for a token
CONTINUATION = "↳"  # marks WordPiece's tokens inside a word; BERT's "##" would be ambiguous here: "#" is a byte too
LONGEST_WORD_BYTES = 1024  # WordPiece gives up on longer words; WORD_PATTERN cannot make one of a quarter of it
NEVER_SCORE = -1e6  # Unigram: the log-probability of special tokens, below any spelling in bytes
SCORE_DIGITS = 6  # Unigram: the library's parallel sums differ in the last bits from run to run; this cuts them off
LIBRARY_STEP = 1e-4  # Unigram: how far apart the library scores bytes that it adds after the pruning
TEXTS_PER_FEED = 1000


@dataclass(frozen=True)
class TokenizerConfig:
    """`vocab_size` counts everything and is an upper bound: a small text may not hold that many tokens."""

    kind: Kind = "bpe"
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"tokenizer kind '{self.kind}' is unknown; known are {', '.join(get_args(Kind))}")
        smallest = len(SPECIAL_TOKENS) + len(_single_bytes(self.kind))
        if self.vocab_size < smallest:
            raise ConfigError(
                f"vocab_size {self.vocab_size} is too small: special tokens and bytes take {smallest} ({self.kind})"
            )


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte 0..255: itself where Latin-1 prints it, else U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def train_subwords(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """Learn a vocabulary and return it as the bytes of a tokenizer.json, the same bytes for the same texts.

    Special tokens have the ids from 0 in the order of `SPECIAL_TOKENS`, then come single bytes, then what was learned.
    Raises `TokenizerError` if there is no text at all, or where a text holds half a surrogate pair.
    """
    trained = {"bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram}[config.kind]
    core = library.Tokenizer(trained(_checked(texts), config.vocab_size))
    core.pre_tokenizer = _pre_tokenizer()
    core.decoder = _decoder(config.kind)
    core.add_special_tokens([library.AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    return core.to_str(pretty=False).encode()


def refuse_half_characters(text: str) -> None:
    """`TokenizerError` if `text` holds a lone surrogate, which is no Unicode character and has no UTF-8 bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text holds U+{ord(text[error.start]):04X}, half a character, at position {error.start}; "
            f"decode the input as UTF-8 with errors='replace' first"
        ) from None


def _checked(texts: Iterable[str]) -> Iterator[str]:
    """The texts that hold anything, each without lone surrogates; `TokenizerError` if there is none."""
    is_empty = True
    for text in texts:
        refuse_half_characters(text)
        if text:
            is_empty = False
            yield text
    if is_empty:
        raise TokenizerError("no text to train a tokenizer on; give at least one text that is not empty")


def _train_bpe(texts: Iterator[str], vocab_size: int) -> models.Model:
    """Merge the most frequent pair until the vocabulary is full.

    No token can come to equal a special one: `WORD_PATTERN` never leaves letters and `<|` in one word.
    """
    core = library.Tokenizer(models.BPE())
    core.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_PAIR_COUNT,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(byte_alphabet().values()),
        show_progress=False,
    )
    core.train_from_iterator(_batches(texts), trainer)
    model: models.Model = core.model
    return model


def _train_wordpiece(texts: Iterator[str], vocab_size: int) -> models.Model:
    """Merge the most frequent pair, with bytes inside a word kept apart from those that begin one.

    The library's own WordPiece trainer numbers the bytes inside words in the order of a randomly seeded hash table,
    so equal counts fall differently from run to run. Its BPE trainer does not, and does the same work once bytes
    inside words have an alphabet of their own: here, the byte alphabet moved up by `shift`.
    """
    shift = 0x1000
    inside = {ord(char): chr(ord(char) + shift) for char in byte_alphabet().values()}
    words = _count_words(texts)
    core = library.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = [*byte_alphabet().values(), *inside.values()]
    own = [*SPECIAL_TOKENS, *_single_bytes("wordpiece")]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(own) + len(alphabet),
        min_frequency=MIN_PAIR_COUNT,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    core.train_from_iterator((" ".join([w[0] + w[1:].translate(inside)] * n) for w, n in words.items()), trainer)
    outside = {ord(there): here for here, there in zip(map(chr, inside), inside.values(), strict=True)}
    learned = [token for token, _ in sorted(core.get_vocab().items(), key=lambda item: item[1])]
    spelled = [CONTINUATION * (ord(t[0]) >= shift) + t.translate(outside) for t in learned]
    pieces = [*own, *spelled[len(alphabet) :]]
    return models.WordPiece(
        vocab={piece: i for i, piece in enumerate(pieces)},
        unk_token="",  # not in the vocabulary: were a word ever unknown, the library would refuse rather than lose it
        max_input_chars_per_word=LONGEST_WORD_BYTES,
        continuing_subword_prefix=CONTINUATION,
    )


def _train_unigram(texts: Iterator[str], vocab_size: int) -> models.Model:
    """Prune a large vocabulary by expectation-maximisation until it is small enough.

    Scores are rounded and pieces sorted, and bytes that the pruning left without a score of their own share the
    lowest one, where the library counts up from it in random order: so equal texts give equal files.
    """
    core = library.Tokenizer(models.Unigram())
    core.pre_tokenizer = _pre_tokenizer()
    alphabet = sorted(byte_alphabet().values())
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(_batches(texts), trainer)
    learned = {piece: round(score, SCORE_DIGITS) for piece, score in _unigram_pieces(core)}
    lowest = min(learned.values())
    unseen = lowest + len(alphabet) * LIBRARY_STEP
    pieces = {piece: lowest if len(piece) == 1 and score < unseen else score for piece, score in learned.items()}
    ordered = sorted(pieces.items(), key=lambda item: (-item[1], item[0]))
    return models.Unigram([*((name, NEVER_SCORE) for name in SPECIAL_TOKENS), *ordered], None, False)


def _unigram_pieces(core: library.Tokenizer) -> list[tuple[str, float]]:
    """What a trained Unigram model holds; the library shows scores only in its JSON."""
    pieces: list[list[Any]] = json.loads(core.to_str())["model"]["vocab"]
    return [(str(piece), float(score)) for piece, score in pieces]


def _count_words(texts: Iterable[str]) -> Mapping[str, int]:
    """How often each word occurs, spelled in the byte alphabet."""
    splitter = _pre_tokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text))
    return counts


def _single_bytes(kind: Kind) -> list[str]:
    """The tokens of one byte. WordPiece needs two of most bytes, and only those that UTF-8 uses in that place."""
    alphabet = byte_alphabet()
    if kind != "wordpiece":
        return [alphabet[byte] for byte in range(256)]
    ascii_bytes, leading = range(0x80), range(0xC2, 0xF5)
    starting = [alphabet[byte] for byte in (*ascii_bytes, *leading)]
    inside = [alphabet[byte] for byte in (*ascii_bytes, *range(0x80, 0xC0), *leading)]
    return starting + [CONTINUATION + char for char in inside]


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(library.Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _decoder(kind: Kind) -> decoders.Decoder:
    """For other programs that read our file; fledge itself joins bytes."""
    if kind == "wordpiece":
        return decoders.Sequence([decoders.Replace(CONTINUATION, ""), decoders.ByteLevel()])
    return decoders.ByteLevel()


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """The library takes lists several times faster than single texts."""
    while batch := list(islice(texts, TEXTS_PER_FEED)):
        yield batch
