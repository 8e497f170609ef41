"""Vocabularies inside GGUF files: the words they cut, the tokens they name, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers as library
from gguf_samples import TEXTS, VOCAB, num_ids, published
from tokenizers import pre_tokenizers

from fledge.errors import CheckpointError, TokenizerError
from fledge.formats.gguf import FLOAT32, INT32, Typed, read_gguf, write_gguf
from fledge.formats.gguf_tokenizer import RULES, read_tokenizer, tokenizer_metadata
from fledge.text.published import PublishedTokenizer, adopt_published
from fledge.text.sentencepiece import Kind, Opening, Piece, layout_of
from fledge.text.tokenizer import TokenizerConfig, train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))
import sentencepiece_samples as pieced

SENTENCES = (
    *TEXTS,
    "We'll see 12345 birds -- they're HERE!!\n\n\n   x\t\ty  (2024)",
    "naïve café, 鸟 and 你好；Ωμέγα… <|im_end|> don't I'D",
    "\r\n\r\n a  b   \n  ",
    "",
)


def through(path: Path, given: PublishedTokenizer, **changes: Any) -> PublishedTokenizer:
    """Written to a file and read again; `changes` are of the keys after "tokenizer.ggml."."""
    metadata, _ = tokenizer_metadata(given, num_ids(given.data))
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    write_gguf(path, {key: value for key, value in metadata.items() if value is not None}, [])
    return read_tokenizer(read_gguf(path))


@pytest.mark.parametrize("words", ["gpt2", "smollm"])
def test_a_written_tokenizer_comes_back_with_all_that_is_said_of_it(words: str, tmp_path: Path) -> None:
    given = published(words=words)
    found = through(tmp_path / "t.gguf", given)
    assert replace(found, data=b"") == replace(given, data=b"")
    theirs, ours = (library.Tokenizer.from_str(one.data.decode()) for one in (given, found))
    for text in SENTENCES:
        assert ours.encode(text).ids == theirs.encode(text).ids
    assert tokenizer_metadata(found, 10_000)[0]["tokenizer.ggml.pre"] == {"gpt2": "gpt-2"}.get(words, words)


# The rules of published tokenizer.json files, as their makers wrote them.
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES
PUBLISHED_WORDS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(library.Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(library.Regex(LLAMA3.replace("{1,3}", "")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("name", PUBLISHED_WORDS)
def test_the_words_of_a_named_rule_are_those_of_the_published_tokenizers(name: str, tmp_path: Path) -> None:
    found = through(tmp_path / "t.gguf", published(), pre=name)
    ours = library.Tokenizer.from_str(found.data.decode()).pre_tokenizer
    for text in SENTENCES:
        assert ours.pre_tokenize_str(text) == PUBLISHED_WORDS[name].pre_tokenize_str(text)
    is_exact = tokenizer_metadata(found, VOCAB)
    assert is_exact[1]
    assert is_exact[0]["tokenizer.ggml.pre"] == name


def test_a_file_that_names_no_rule_has_the_default_one(tmp_path: Path) -> None:
    """llama.cpp's: punctuation apart, then GPT-2's words, digits in threes."""
    found = through(tmp_path / "t.gguf", published(), pre=None)
    words = library.Tokenizer.from_str(found.data.decode()).pre_tokenizer.pre_tokenize_str("ab, 12345")
    assert [word for word, _ in words] == ["ab", ",", "Ġ", "123", "45"]


def test_rows_without_a_token_are_written_as_unused_and_read_as_none(tmp_path: Path) -> None:
    metadata, _ = tokenizer_metadata(published(), VOCAB + 3)
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCAB + 2}]"
    write_gguf(tmp_path / "t.gguf", metadata, [])
    found = read_tokenizer(read_gguf(tmp_path / "t.gguf"))
    assert num_ids(found.data) == VOCAB
    tokenizer, _ = adopt_published(found, VOCAB + 3)
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (VOCAB + 2, VOCAB + 3)


def test_a_tokenizer_of_ours_has_a_rule_without_a_name() -> None:
    ours = train_tokenizer(TEXTS, TokenizerConfig("bpe", 300))
    metadata, is_exact = tokenizer_metadata(PublishedTokenizer(ours._data), ours.vocab_size)
    assert (metadata["tokenizer.ggml.pre"], is_exact) == ("gpt-2", False)


def test_only_bpe_is_written() -> None:
    ours = train_tokenizer(TEXTS, TokenizerConfig("unigram", 400))
    with pytest.raises(CheckpointError, match="a Unigram vocabulary has no place"):
        tokenizer_metadata(PublishedTokenizer(ours._data), ours.vocab_size)


def test_control_tokens_are_special_and_user_defined_ones_are_not(tmp_path: Path) -> None:
    metadata, _ = tokenizer_metadata(published(), VOCAB)
    kinds = list(metadata["tokenizer.ggml.token_type"].value)
    kinds[3] = 4
    found = through(tmp_path / "t.gguf", published(), token_type=Typed(INT32, kinds))
    added = {token["content"]: token["special"] for token in json.loads(found.data)["added_tokens"]}
    assert added == {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<unused>": False}


def test_a_text_begins_with_bos_where_the_file_or_its_rule_says_so(tmp_path: Path) -> None:
    assert not through(tmp_path / "a", published(), add_bos_token=None).begins
    assert through(tmp_path / "b", published(), add_bos_token=True).begins
    assert through(tmp_path / "c", published(), add_bos_token=None, pre="llama-bpe").begins
    assert not through(tmp_path / "d", published(), add_bos_token=True, bos_token_id=None).begins


def test_rules_have_names_of_their_own() -> None:
    names = [name for rule in RULES for name in rule.names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "t5"}, "a tokenizer of kind 't5' is not supported: known are byte-level BPE, 'gpt2', and"),
        ({"model": "llama"}, "scores must hold a number for each"),
        ({"model": None}, "kind None"),
        ({"pre": "viking"}, "pre 'viking' is not supported: known are gpt-2"),
        ({"pre": 7}, "pre 7 must be a str"),
        ({"tokens": None}, "tokens must hold strings"),
        ({"tokens": ["a", "a"]}, "each token once"),
        ({"merges": None}, "merges must hold strings"),
        ({"merges": ["a b c"]}, "is no pair"),
        ({"token_type": Typed(INT32, [1, 2])}, "a number for each"),
        ({"token_type": "x"}, "a number for each"),
        ({"token_type": Typed(FLOAT32, [math.nan] * VOCAB)}, "a number for each"),
        ({"tokens": Typed(INT32, [1, 2])}, "tokens .* must be a list"),
        ({"pre": Typed(INT32, [1, 2])}, "pre .* must be a str"),
        ({"eos_token_id": Typed(INT32, [1, 2])}, "eos_token_id .* must be a int"),
        ({"eos_token_id": 99_999}, "eos_token_id 99999 is outside"),
        ({"eos_token_id": True}, "eos_token_id True must be a int"),
        ({"add_bos_token": 1}, "add_bos_token 1 must be a bool"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        through(tmp_path / "t.gguf", published(), **changes)


@pytest.mark.parametrize("template", [7, ["a"], Typed(INT32, [1, 2]), True])
def test_a_template_that_is_no_text_is_refused(template: Any, tmp_path: Path) -> None:
    metadata, _ = tokenizer_metadata(published(), VOCAB)
    write_gguf(tmp_path / "t.gguf", {**metadata, "tokenizer.chat_template": template}, [])
    with pytest.raises(CheckpointError, match=r"tokenizer\.chat_template .* must be a str"):
        read_tokenizer(read_gguf(tmp_path / "t.gguf"))


def test_a_vocabulary_without_merges_comes_back(tmp_path: Path) -> None:
    bytes_only = json.loads(published().data)
    bytes_only["model"]["merges"] = []
    found = through(tmp_path / "t.gguf", replace(published(), data=json.dumps(bytes_only).encode()))
    assert json.loads(found.data)["model"]["merges"] == []


def test_an_end_that_is_a_token_of_ordinary_text_is_none(tmp_path: Path) -> None:
    """The default of a config class, left where it was by whoever trained another vocabulary."""
    letter = json.loads(published().data)["model"]["vocab"]["a"]
    found = through(tmp_path / "t.gguf", published(), eos_token_id=letter, eot_token_id=2, bos_token_id=letter)
    assert (found.bos, found.ends) == (None, ("<|im_end|>",))
    tokenizer, _ = adopt_published(found, VOCAB)
    assert tokenizer.decode(tokenizer.encode("a bird")) == "a bird"


def test_a_tokenizer_beyond_the_rows_of_the_model_is_not_written() -> None:
    with pytest.raises(CheckpointError, match=f"has {VOCAB} tokens, the model {VOCAB - 1} rows"):
        tokenizer_metadata(published(), VOCAB - 1)


def test_merges_of_tokens_that_are_not_there_are_refused(tmp_path: Path) -> None:
    found = through(tmp_path / "t.gguf", published(), merges=["a b", "zz yy"])
    with pytest.raises(TokenizerError, match="merges 'a' and 'b', which its vocabulary lacks"):
        adopt_published(found, VOCAB)


# SentencePiece's kind, "llama".

SPACED = Piece("▁▁▁", 0.0, Kind.USER_DEFINED)
NAMED = Piece("<|user|>", 0.0, Kind.USER_DEFINED)


@pytest.mark.parametrize("opening", ["always", "never"])
def test_pieces_come_back_with_all_that_is_said_of_them(opening: Opening, tmp_path: Path) -> None:
    given = replace(pieced.published(opening, of=(SPACED, NAMED)), pad="<unk>")
    found = through(tmp_path / "t.gguf", given)
    assert replace(found, data=b"") == replace(given, data=b"")
    assert json.loads(found.data) == json.loads(given.data)
    kept = read_gguf(tmp_path / "t.gguf").metadata
    pieces = pieced.pieces(SPACED, NAMED)
    assert list(kept["tokenizer.ggml.token_type"]) == [piece.kind for piece in pieces]
    as_llama_cpp_has_it = ["   " if piece == SPACED else piece.text for piece in pieces]
    assert kept["tokenizer.ggml.tokens"] == as_llama_cpp_has_it
    assert kept["tokenizer.ggml.add_space_prefix"] is (opening == "always")


def test_rows_without_a_piece_are_written_as_unused_and_read_as_none(tmp_path: Path) -> None:
    size = len(pieced.pieces()) + 2
    write_gguf(tmp_path / "t.gguf", tokenizer_metadata(pieced.published(), size)[0], [])
    found = read_tokenizer(read_gguf(tmp_path / "t.gguf"))
    assert json.loads(found.data) == json.loads(pieced.published().data)
    assert adopt_published(found, size)[0].pad_id == size - 1


def test_what_a_file_of_pieces_leaves_out_is_as_llama_cpp_has_it(tmp_path: Path) -> None:
    keys = ("bos_token_id", "eos_token_id", "add_bos_token", "add_space_prefix", "pre", "unknown_token_id")
    found = through(tmp_path / "t.gguf", pieced.published(), **dict.fromkeys(keys))
    assert replace(found, data=b"") == replace(pieced.published(), data=b"")
    assert json.loads(found.data) == json.loads(pieced.published().data)
    assert not through(tmp_path / "u.gguf", pieced.published(), add_bos_token=False).begins


def test_merges_that_came_from_no_scores_are_written_and_told() -> None:
    source = pieced.published()
    size = len(pieced.pieces())
    assert tokenizer_metadata(source, size)[1]
    layout = json.loads(source.data)
    del layout["model"]["merges"][-1]
    assert not tokenizer_metadata(replace(source, data=json.dumps(layout).encode()), size)[1]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"scores": None}, "scores must hold a number for each"),
        ({"scores": Typed(FLOAT32, [0.0])}, "scores must hold a number for each"),
        ({"scores": Typed(INT32, [0] * len(pieced.pieces()))}, "scores must hold a number for each"),
        ({"scores": Typed(FLOAT32, [math.inf] * len(pieced.pieces()))}, "scores must hold a number for each"),
        ({"scores": ["0"]}, "scores must hold a number for each"),
        ({"token_type": Typed(INT32, [9] * len(pieced.pieces()))}, "token_type must hold numbers from 1 to 6"),
        ({"add_space_prefix": 1}, "add_space_prefix 1 must be a bool"),
        ({"bos_token_id": 9999}, "bos_token_id 9999 is outside"),
    ],
)
def test_pieces_that_cannot_be_used_are_refused_by_name(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        through(tmp_path / "t.gguf", pieced.published(), **changes)


def test_a_piece_of_absurd_length_is_refused(tmp_path: Path) -> None:
    metadata, _ = tokenizer_metadata(pieced.published(), len(pieced.pieces()))
    metadata["tokenizer.ggml.tokens"][300] = "a" * 100_000
    write_gguf(tmp_path / "t.gguf", metadata, [])
    with pytest.raises(CheckpointError, match=r"t\.gguf: its vocabulary has pieces of up to 100,000"):
        read_tokenizer(read_gguf(tmp_path / "t.gguf"))


def test_a_vocabulary_without_bytes_is_refused_when_it_is_to_be_used(tmp_path: Path) -> None:
    few = [piece for piece in pieced.pieces() if piece.kind != Kind.BYTE]
    source = PublishedTokenizer(json.dumps(layout_of(few, "always")).encode(), "<s>", ("</s>",), None, True)
    found = through(tmp_path / "t.gguf", source)
    with pytest.raises(TokenizerError, match="no tokens for single bytes"):
        adopt_published(found, len(few))
