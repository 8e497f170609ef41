from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers as library
from text_samples import KINDS, trained
from tokenizers import decoders, models, pre_tokenizers, processors

from fledge.errors import TokenizerError
from fledge.text.foreign import adopt, gpt2_layout
from fledge.text.report import gpt2_tokenizer
from fledge.text.subwords import Kind, byte_alphabet
from fledge.text.tokenizer import NAMED_SPECIAL_TOKENS, Tokenizer

CHATML = {"<|end|>": "<|im_end|>", "<|pad|>": "<pad>", "<|endoftext|>": "<|endoftext|>"}
MAPPING: dict[str, str | None] = {name: CHATML.get(name) for name in NAMED_SPECIAL_TOKENS}


def foreign(*special: str, plain: tuple[str, ...] = (), merges: tuple[tuple[str, str], ...] = (("h", "i"),)) -> bytes:
    """A byte-level BPE file as others make them: bytes first, merges, then added tokens."""
    vocab = {char: i for i, char in enumerate(byte_alphabet().values())}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    core = library.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([library.AddedToken(name, special=True, normalized=False) for name in special])
    core.add_tokens([library.AddedToken(name, special=False) for name in plain])
    core.enable_truncation(2)
    core.enable_padding(length=9)
    return core.to_str().encode()


def test_a_file_without_our_special_tokens_says_which_it_lacks_and_what_to_do() -> None:
    with pytest.raises(TokenizerError, match=r"lacks .*<\|pad\|>.*special_tokens=.*<\|endoftext\|>"):
        Tokenizer(foreign("<|endoftext|>"))


def test_a_mapping_renames_and_adds_without_moving_an_id() -> None:
    data = foreign("<|endoftext|>", "<pad>", "<|im_end|>", plain=("<tool>",))
    theirs = library.Tokenizer.from_str(data.decode())
    ours = Tokenizer(adopt(data, MAPPING))
    assert ours.special_id("<|end|>") == theirs.token_to_id("<|im_end|>")
    assert ours.pad_id == theirs.token_to_id("<pad>")
    assert ours.special_id("<|user|>") >= theirs.get_vocab_size()
    assert ours.vocab_size == theirs.get_vocab_size() + len(NAMED_SPECIAL_TOKENS) - 3
    for text in ("hi <|im_end|> <|end|> <pad>", "<tool>", "天气 and a text of more than two tokens"):
        assert ours.special_ids.isdisjoint(ours.encode(text))
        assert ours.decode(ours.encode(text)) == text


def test_an_adopted_tokenizer_saves_its_mapping(tmp_path: Any) -> None:
    (tmp_path / "theirs.json").write_bytes(foreign("<|endoftext|>", "<pad>", "<|im_end|>"))
    adopted = Tokenizer.load(tmp_path / "theirs.json", special_tokens=MAPPING)
    adopted.save(tmp_path / "ours.json")
    again = Tokenizer.load(tmp_path / "ours.json")
    assert again.hash == adopted.hash
    assert again.special_id("<|end|>") == adopted.special_id("<|end|>")


@pytest.mark.parametrize("kind", KINDS)
def test_renaming_reaches_every_place_a_name_stands_in(kind: Kind) -> None:
    theirs = trained(kind)._data.replace(b"<|end|>", b"<|im_end|>")
    assert adopt(theirs, {"<|end|>": "<|im_end|>"}) == trained(kind)._data


@pytest.mark.parametrize(
    ("mapping", "complaint"),
    [
        ({"<|end|>": "<|nothing|>"}, "has no token"),
        ({"<|finish|>": "<pad>"}, "no special token of fledge"),
        ({"<|end|>": "<pad>", "<|pad|>": "<pad>"}, "at once"),
        ({"<|pad|>": "<|endoftext|>", "<|endoftext|>": "<|endoftext|>"}, "at once"),
        ({"<|endoftext|>": None}, "of its own"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(mapping: dict[str, str | None], complaint: str) -> None:
    with pytest.raises(TokenizerError, match=complaint):
        adopt(foreign("<|endoftext|>", "<pad>"), mapping)


def test_c01_padding_that_is_the_end_of_text_is_refused() -> None:
    layout = json.loads(adopt(foreign("<|endoftext|>", "<pad>", "<|im_end|>"), MAPPING))
    ids = {token["content"]: token for token in layout["added_tokens"]}
    ids["<|pad|>"]["id"] = ids["<|endoftext|>"]["id"]
    with pytest.raises(TokenizerError, match="padding"):
        Tokenizer(json.dumps(layout).encode())


def test_a_special_token_that_the_vocabulary_itself_spells_is_still_not_made_from_text() -> None:
    # Without a splitting pattern these merges join "<s>" into the very entry that the special token has.
    core = library.Tokenizer.from_str(foreign("<s>", merges=(("<", "s"), ("<s", ">"))).decode())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    data = core.to_str().encode()
    assert core.token_to_id("<s>") in library.Tokenizer.from_str(data.decode()).encode("a<s>").ids
    rest: dict[str, str | None] = dict.fromkeys(NAMED_SPECIAL_TOKENS)
    tokenizer = Tokenizer(adopt(data, rest))
    for text in ("<s>", "a <s><s> b", "<s"):
        assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]


def changed(**parts: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        core = library.Tokenizer.from_str(adopt(foreign("<|endoftext|>", "<pad>", "<|im_end|>"), MAPPING).decode())
        for name, part in parts.items():
            setattr(core, name, part)
        return core.to_str().encode()

    return make


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (changed(pre_tokenizer=pre_tokenizers.Whitespace()), "does not work on bytes"),
        (changed(pre_tokenizer=pre_tokenizers.Metaspace()), "no tokens for single bytes"),
        (changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "space before every text"),
    ],
)
def test_files_whose_texts_would_not_come_back_are_refused(make: Callable[[], bytes], complaint: str) -> None:
    with pytest.raises(TokenizerError, match=complaint):
        Tokenizer(make())


def test_a_post_processor_of_the_file_adds_nothing() -> None:
    extra = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 257)])
    tokenizer = Tokenizer(changed(post_processor=extra)())
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("hi"))
    assert tokenizer.encode_batch(["hi"]) == [tokenizer.encode("hi")]


def test_gpt2_files_give_gpt2_ids() -> None:
    vocab = {char: i for i, char in enumerate(byte_alphabet().values())} | {"hi": 256, "Ġhi": 257, "<|endoftext|>": 258}
    merges = b"#version: 0.2\nh i\n\xc4\xa0 hi\n"
    tokenizer = gpt2_tokenizer(json.dumps(vocab).encode(), merges)
    assert tokenizer.encode("hi hi") == [256, 257]
    assert tokenizer.end_of_text_id == 258
    assert tokenizer.vocab_size == 259 + len(NAMED_SPECIAL_TOKENS) - 1
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("<|endoftext|>"))


@pytest.mark.parametrize(
    ("vocab", "merges"), [(b"no json", b""), (b"{}", b"a b c\n"), (b"{}", b"\xff"), (b"{}", b"a b\n")]
)
def test_other_files_are_not_taken_for_gpt2s(vocab: bytes, merges: bytes) -> None:
    with pytest.raises(TokenizerError, match="GPT-2"):
        gpt2_layout(vocab, merges)


def harmed(**changes: Any) -> bytes:
    read = json.loads(foreign("<|endoftext|>", "<|pad|>"))
    for path, value in changes.items():
        *way, last = path.split("__")
        inner = read
        for step in way:
            inner = inner[int(step) if step.isdigit() else step]
        inner[last] = value
    return json.dumps(read).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 200_000,
        b"[]",
        b"null",
        b"\xff\xfe",
        harmed(model=None),
        harmed(model__vocab=None),
        harmed(model__vocab=7),
        harmed(model__vocab={"a": "0"}),
        harmed(model__vocab={"a": [0]}),
        harmed(model__vocab={"a": 0.5}),
        harmed(model__vocab={"a": True}),
        harmed(model__merges=[["a"]]),
        harmed(model__merges=[7]),
        harmed(model__merges=[["a", ["b"]]]),
        harmed(added_tokens={"id": 0}),
        harmed(added_tokens=[7]),
        harmed(added_tokens__0__id="0"),
        harmed(added_tokens__0__id=[0]),
        harmed(added_tokens__0__content=None),
        harmed(added_tokens__0__special="yes"),
        harmed(pre_tokenizer={"type": "Sequence", "pretokenizers": 7}),
        harmed(pre_tokenizer={"pretokenizers": [{}]}),
        harmed(pre_tokenizer=[1, 2]),
        harmed(pre_tokenizer={"type": ["ByteLevel"]}),
        harmed(normalizer={"type": "Sequence", "normalizers": [7, None]}, pre_tokenizer=None),
    ],
)
def test_a_damaged_file_is_refused_and_nothing_else(data: bytes) -> None:
    with pytest.raises(TokenizerError):
        Tokenizer(data)


def test_our_own_file_needs_no_adoption() -> None:
    trained().encode("hi")
    with pytest.raises(TokenizerError, match="of its own"):
        adopt(trained()._data, {"<|pad|>": None})
