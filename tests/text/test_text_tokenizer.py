from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers as library
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_samples import KINDS, TEXTS, trained

from fledge.errors import ConfigError, RunError, TokenizerError
from fledge.text.subwords import WORD_PATTERN, Kind, byte_alphabet
from fledge.text.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer, TokenizerConfig, train_tokenizer

HERE = Path(__file__).parent
every_kind = pytest.mark.parametrize("kind", KINDS)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
# Arbitrary characters seldom meet what is dangerous: special names, white-space runs, scripts, emoji of many parts.
SPACES = (" ", "   ", "\n", "\r\n", "\n\n\t", "\x00", "\x1c", "\u2028", "\u3000", "\ufeff", "\u200d")
WORDS = (
    "def f(x):\n    return",
    "学习",
    "，",
    "。",
    "é",
    "e\u0301",
    "👩\u200d👩\u200d👧\u200d👦",
    "🇨🇳",
    "don't",
    "1998",
    "<|",
)
MARKS = ("|>", "##", "↳", "Ġ")
fragments = st.sampled_from((*SPECIAL_TOKENS, *SPACES, *WORDS, *MARKS))
hard_text = st.lists(fragments | any_text, max_size=8).map("".join)


@every_kind
@settings(max_examples=120, deadline=None)
@given(text=hard_text)
@example(text="")
@example(text="".join(map(chr, range(0x250))))
@example(text="\U0010ffff\ue000\ufffe")
def test_every_unicode_text_comes_back_exactly(kind: Kind, text: str) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.special_ids.isdisjoint(ids)


@every_kind
@pytest.mark.parametrize("unit", ["a", " ", "\n", "中", "!", "7", "🙂", "\x00", "e\u0301", "a1", "𝒳"])
def test_a_very_long_word_comes_back_and_is_cut_into_bounded_words(kind: Kind, unit: str) -> None:
    text = unit * 20_000
    assert trained(kind).decode(trained(kind).encode(text)) == text


@every_kind
@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_text_that_names_a_special_token_stays_text(kind: Kind, name: str) -> None:
    tokenizer = trained(kind)
    for text in (name, f"before {name} after", name * 3, f"<|{name}|>"):
        assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_names_a_special_token_is_spelled_like_any_other() -> None:
    tokenizer = trained()
    assert tokenizer.pieces(tokenizer.encode("<|end|>")) == ["<|", "end", "|>"]


def test_wordpiece_tells_a_hash_from_its_mark_inside_words() -> None:
    tokenizer = train_tokenizer(["## one ### two a#b a##b ↳c a↳c"] * 9, TokenizerConfig("wordpiece", 600))
    for text in ("#", "##", "###", "a#", "a##b", "↳", "a↳↳c", "####"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@every_kind
def test_special_tokens_have_the_first_ids_in_their_order(kind: Kind) -> None:
    tokenizer = trained(kind)
    assert [tokenizer.special_id(name) for name in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.end_of_text_id, tokenizer.pad_id) == (0, 1)
    assert tokenizer.special_ids == frozenset(range(len(SPECIAL_TOKENS)))
    with pytest.raises(TokenizerError, match=r"<\|no\|>"):
        tokenizer.special_id("<|no|>")


@every_kind
def test_decoding_drops_special_tokens(kind: Kind) -> None:
    tokenizer = trained(kind)
    ids = [tokenizer.end_of_text_id, *tokenizer.encode("学习 now"), tokenizer.special_id("<|end|>"), tokenizer.pad_id]
    assert tokenizer.decode(ids) == "学习 now"


@every_kind
@pytest.mark.parametrize("text", ["\ud800", "fine until here \udfff and on"])
def test_half_a_surrogate_pair_is_refused_with_its_place(kind: Kind, text: str) -> None:
    for encode in (trained(kind).encode, lambda t: trained(kind).encode_batch(["good", t])):
        with pytest.raises(TokenizerError, match=f"position {len(text) - 1 if len(text) == 1 else 16}"):
            encode(text)
    with pytest.raises(TokenizerError, match="half a character"):
        train_tokenizer(["good", text], TokenizerConfig(kind, 600))


@every_kind
def test_training_again_gives_the_same_file(kind: Kind) -> None:
    again = train_tokenizer(iter(TEXTS * 4), TokenizerConfig(kind, 600))
    assert again.hash == trained(kind).hash


@pytest.mark.slow
@every_kind
def test_another_process_with_other_threads_gives_the_same_file(kind: Kind) -> None:
    program = f"from text_samples import trained; print(trained({kind!r}).hash)"  # a fresh hash seed and thread pool
    for threads in ("1", "3"):
        environment = {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "RAYON_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == trained(kind).hash


@every_kind
def test_the_vocabulary_is_never_larger_than_asked_and_holds_every_byte(kind: Kind) -> None:
    tokenizer = trained(kind, 500)
    assert tokenizer.vocab_size <= 500
    assert tokenizer.decode(tokenizer.encode("".join(map(chr, range(256))))) == "".join(map(chr, range(256)))
    lone = train_tokenizer(["a"], TokenizerConfig(kind, 500))
    assert lone.decode(lone.encode("天气 🙂 \x00")) == "天气 🙂 \x00"


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
@every_kind
def test_training_on_nothing_is_refused(kind: Kind, texts: list[str]) -> None:
    with pytest.raises(TokenizerError, match="no text"):
        train_tokenizer(texts, TokenizerConfig(kind, 600))


def test_an_impossible_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match="too small"):
        TokenizerConfig("bpe", 271)
    assert TokenizerConfig("bpe", 272).vocab_size == 272
    with pytest.raises(ConfigError, match="unknown"):
        TokenizerConfig("words", 600)  # type: ignore[arg-type]


@every_kind
def test_a_saved_tokenizer_loads_as_the_same(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokenizer.json"
    trained(kind).save(path)
    loaded = Tokenizer.load(path)
    assert loaded.hash == trained(kind).hash
    assert loaded.vocab_size == trained(kind).vocab_size
    loaded.save(path)
    assert Tokenizer.load(path).hash == loaded.hash
    assert loaded.encode(TEXTS[1]) == trained(kind).encode(TEXTS[1])


@every_kind
def test_the_library_alone_reads_our_file_and_decodes_alike(kind: Kind, tmp_path: Path) -> None:
    trained(kind).save(tmp_path / "tokenizer.json")
    alone = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS[:3]:
        assert alone.encode(text).ids == trained(kind).encode(text)
        assert alone.decode(alone.encode(text).ids) == text


def test_files_that_are_no_tokenizer_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained().save(path)
    whole = path.read_bytes()
    damaged = [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"model": 3, "added_tokens": []}',
        whole[:-20],
        whole.replace(b'"BPE"', b'"CPE"'),
    ]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            Tokenizer.load(path)
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path / "absent.json")
    with pytest.raises(RunError, match="cannot be written"):
        trained().save(path / "below-a-file" / "tokenizer.json")


@every_kind
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streamed_text_equals_decoded_text_and_never_holds_half_a_character(kind: Kind, data: st.DataObject) -> None:
    tokenizer = trained(kind)
    text = data.draw(hard_text)
    stream = StreamDecoder(tokenizer)
    parts = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(parts) == text
    assert stream.flush() == ""
    noise = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))  # any ids a model may draw
    assert "".join(map(stream.push, noise)) + stream.flush() == tokenizer.decode(noise)


def test_a_stream_holds_a_character_back_until_it_is_whole() -> None:
    tokenizer = train_tokenizer(["abc"], TokenizerConfig("bpe", 272))
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in tokenizer.encode("é中🙂")] == ["", "é", "", "", "中", "", "", "", "🙂"]
    stream.push(tokenizer.encode("中")[0])
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@every_kind
def test_a_batch_encodes_like_its_texts_one_by_one(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fledge.text.tokenizer.CHARS_PER_CALL", 200)
    texts = [*TEXTS, "", *TEXTS, "<|end|>"]
    assert trained(kind).encode_batch(texts) == [trained(kind).encode(text) for text in texts]
    assert trained(kind).encode_batch([]) == []


def test_ids_outside_the_vocabulary_are_refused() -> None:
    for wrong in (-1, trained().vocab_size):
        with pytest.raises(TokenizerError, match=str(wrong)):
            trained().decode([5, wrong])
        with pytest.raises(TokenizerError, match=str(wrong)):
            trained().token_bytes(wrong)


def test_words_are_cut_as_the_pattern_promises() -> None:
    splitter = library.pre_tokenizers.Split(library.Regex(WORD_PATTERN), "isolated")

    def words(text: str) -> list[str]:
        return [word for word, _ in splitter.pre_tokenize_str(text)]

    assert words("It wasn't 'test' 1998") == ["It", " wasn", "'t", " '", "test", "'", " 19", "98"]
    assert words("if x:\n    y = f(1)\n") == ["if", " x", ":\n    ", "y", " =", " f", "(", "1", ")\n"]
    assert words("我用Python写代码，很好") == ["我用", "Python", "写代码", "，", "很好"]
    assert words("<|end|>") == ["<|", "end", "|>"]
    assert words("one.\n\nTwo") == ["one", ".", "\n\n", "Two"]


@settings(max_examples=150, deadline=None)
@given(text=hard_text.map(lambda text: text * 40))
@example(text=" " * 2000 + "\u3000" * 2000)
@example(text="\n" * 2000 + "\t" * 2000 + "x")
@example(text="中" * 2000 + "1" * 2000 + "!" * 2000 + "𝒳" * 2000)
def test_words_cover_the_text_and_are_short(text: str) -> None:
    splitter = library.pre_tokenizers.Split(library.Regex(WORD_PATTERN), "isolated")
    spans = [span for _, span in splitter.pre_tokenize_str(text)]
    edges = [0, *(end for _, end in spans)]
    assert [(a, b) for a, b in pairwise(edges)] == spans
    assert edges[-1] == len(text)
    assert max((len(text[a:b].encode()) for a, b in spans), default=0) <= 256


def test_no_learned_token_is_spelled_like_a_special_one() -> None:
    for kind in KINDS:
        tokenizer = trained(kind)
        names = {name.encode() for name in SPECIAL_TOKENS}
        assert not names & {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}


def test_the_byte_alphabet_is_the_librarys() -> None:
    assert sorted(byte_alphabet().values()) == sorted(library.pre_tokenizers.ByteLevel.alphabet())
    splitter = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for char in ("A", " ", "\x00", "é", "中", "\xad"):
        spelled = "".join(byte_alphabet()[byte] for byte in char.encode())
        assert splitter.pre_tokenize_str(char)[0][0] == spelled


def test_learned_tokens_shorten_english_code_and_chinese() -> None:
    tokenizer = trained("bpe", 800)
    for text in TEXTS[:3]:
        assert len(text.encode()) / len(tokenizer.encode(text)) > 2.0
    assert tokenizer.token_bytes(tokenizer.encode("学习语言")[0]).startswith("学习".encode())


def test_pieces_show_special_tokens_and_half_characters_readably() -> None:
    tokenizer = train_tokenizer(["abc"], TokenizerConfig("bpe", 272))
    assert tokenizer.pieces([0, *tokenizer.encode("aé")]) == ["<|endoftext|>", "a", "\\xc3", "\\xa9"]


def test_special_tokens_that_are_said_have_bytes_and_text_never_becomes_one(tmp_path: Path) -> None:
    trained("bpe").save(tmp_path / "tokenizer.json")
    layout = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    size = trained("bpe").vocab_size
    layout["added_tokens"].append({**layout["added_tokens"][-1], "content": "<tool_call>", "id": size})
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.spoken_ids == {"<tool_call>": size}
    assert tokenizer.framing_ids == tokenizer.special_ids - {size}
    assert tokenizer.decode([tokenizer.end_of_text_id, size]) == "<tool_call>"
    text = "a <tool_call>b"
    assert size not in tokenizer.encode(text)
    assert tokenizer.encode_spoken(text) == [*tokenizer.encode("a "), size, *tokenizer.encode("b")]
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode_spoken(text)) == text


def test_importing_touches_no_environment() -> None:
    program = (
        "import os; b = dict(os.environ); import fledge.text.chat, fledge.text.report; assert dict(os.environ) == b"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=HERE.parents[1])


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    trained().save(tmp_path / "t.json")
    assert hashlib.sha256((tmp_path / "t.json").read_bytes()).hexdigest() == trained().hash
    assert json.loads((tmp_path / "t.json").read_bytes())["model"]["type"] == "BPE"
