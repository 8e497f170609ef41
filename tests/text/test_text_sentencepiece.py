"""Vocabularies of SentencePiece: equal to its own program, every text back, spaces in their places."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece_samples import LLAMA2, TEXTS, model, pieces, published, their_ids, tokenizer

from fledge.errors import TokenizerError
from fledge.formats.huggingface_tokenizer import read_tokenizer
from fledge.text.foreign import parse
from fledge.text.published import adopt_published, publish_imported
from fledge.text.sentencepiece import Kind, Opening, Piece, layout_of, merges_of, scores_of
from fledge.text.template import TemplateRenderer
from fledge.text.tokenizer import StreamDecoder, Tokenizer
from fledge.types import Conversation

OPENINGS: tuple[Opening, ...] = ("always", "first", "never")
TOKENIZERS = {opening: tokenizer(opening) for opening in OPENINGS}
OURS = TOKENIZERS["always"]
SPACES = st.text(alphabet=" ▁\n\tab[]INST/<>0x中é🐦", max_size=40)


def streamed(found: Tokenizer, ids: list[int], *, within: bool = False) -> list[str]:
    stream = StreamDecoder(found, within=within)
    return [*map(stream.push, ids), stream.flush()]


# Known answers, worked out by hand from the order of the pieces in `sentencepiece_samples.WORDS`.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a bird in a nest", [" a", " bird", " in", " a", " nest"]),
        ("bird", [" bird"]),
        (" bird", [" ", " bird"]),
        ("    ", ["    ", " "]),
        ("[INST]", [" [", "INST", "]"]),
        ("é", [" ", "\\xc3", "\\xa9"]),
        ("a\nb", [" a", "\n", "b"]),
        ("▁", [" ", "\\xe2", "\\x96", "\\x81"]),
        ("", []),
    ],
)
def test_pieces_are_put_together_in_the_order_of_their_scores(text: str, expected: list[str]) -> None:
    assert OURS.pieces(OURS.encode(text)) == expected


@pytest.mark.parametrize(
    ("opening", "first", "later"),
    [("always", " bird", " bird"), ("first", " bird", "bird"), ("never", "bird", "bird")],
)
def test_a_space_stands_before_a_text_and_within_one_it_does_not(opening: Opening, first: str, later: str) -> None:
    found = TOKENIZERS[opening]
    assert "".join(found.pieces(found.encode("bird"))) == first
    assert "".join(found.pieces(found.encode("bird", within=True))) == "bird"
    template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    mine = TemplateRenderer(*adopt_published(published(opening, template), len(pieces())))
    ids = mine.render(Conversation.of(("user", "bird"), ("assistant", "bird"))).ids
    assert "".join(mine.tokenizer.pieces(ids)) == f"<|endoftext|>{later}</s>{later}</s>"
    assert mine.tokenizer.decode(ids) == "birdbird"


def test_an_answer_that_continues_keeps_its_space_and_one_of_its_own_does_not() -> None:
    ids = OURS.encode("bird nest")
    assert (OURS.decode(ids), OURS.decode(ids, within=True)) == ("bird nest", " bird nest")
    assert OURS.decode([OURS.end_of_text_id, *ids], within=True) == "bird nest"
    assert streamed(OURS, ids) == ["bird", " nest", ""]
    assert streamed(OURS, ids, within=True) == [" bird", " nest", ""]
    stream = StreamDecoder(OURS)
    for _ in range(2):  # it starts anew
        assert "".join(map(stream.push, ids)) + stream.flush() == "bird nest"


@pytest.mark.parametrize("opening", OPENINGS)
@settings(deadline=None)
@given(text=st.text() | SPACES)
def test_every_text_comes_back_at_once_and_in_a_stream(opening: Opening, text: str) -> None:
    found = TOKENIZERS[opening]
    ids = found.encode(text)
    assert found.special_ids.isdisjoint(ids)
    assert found.encode_batch([text]) == [ids]
    assert found.decode(ids) == text
    assert found.decode([found.end_of_text_id, *ids]) == text
    inner = found.encode(text, within=True)
    assert b"".join(map(found.token_bytes, inner)) == text.encode()
    assert found.decode(inner, within=True) == text
    assert found.encode_spoken(text) == inner
    assert "".join(streamed(found, ids)) == text
    assert "".join(streamed(found, inner, within=True)) == text


@settings(deadline=None)
@given(st.lists(st.integers(0, len(pieces()) - 1)), st.booleans(), st.sampled_from(OPENINGS))
def test_a_stream_of_any_ids_says_what_they_say_together_and_never_half_a_character(
    ids: list[int], within: bool, opening: Opening
) -> None:
    found = TOKENIZERS[opening]
    said = streamed(found, ids, within=within)
    assert "".join(said) == found.decode(ids, within=within)
    said_bytes = b"".join(map(found.token_bytes, ids))
    if said_bytes.decode(errors="ignore").encode() == said_bytes:
        assert not any("\ufffd" in part for part in said)


# Against SentencePiece itself.

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "named": {"user_defined_symbols": ("[INST]", "<|user|>", "天气", "  "), "control_symbols": ("<ctl>",)},
    "without a space": {"add_dummy_prefix": False},
    "of other ids": {"unk_id": 3, "bos_id": 5, "eos_id": 0, "pad_id": 1, "bos_piece": "<begin>"},
    "words that reach over spaces": {"split_by_whitespace": False, "split_by_unicode_script": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_tokenizer_model_has_the_ids_of_sentencepiece(name: str, tmp_path: Any) -> None:
    data = model(**OPTIONS[name])
    (tmp_path / "tokenizer.model").write_bytes(data)
    found, _ = adopt_published(read_tokenizer(tmp_path), 1000)
    for text in TEXTS:
        assert found.encode(text) == their_ids(data, text)
        assert found.decode(found.encode(text)) == text


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("learned")
    (folder / "tokenizer.model").write_bytes(model())
    return adopt_published(read_tokenizer(folder), 1000)[0]


@settings(deadline=None, max_examples=200)
@given(text=st.text("abINST[]/ \n天气我é🐦0x<>") | st.text())
def test_random_texts_have_the_ids_of_sentencepiece(learned: Tokenizer, text: str) -> None:
    if "▁" not in text:  # to SentencePiece that is a space; here it comes back
        assert learned.encode(text) == their_ids(model(), text)


# Against transformers.

TALKS = (
    Conversation.of(("user", "a bird")),
    Conversation.of(("user", "a bird"), ("assistant", "in a nest"), ("user", "?")),
    Conversation.of(("user", "今天 é"), ("assistant", "a\nb  c")),
)
TEMPLATES = {
    "llama 2": LLAMA2,
    "without spaces": "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' + message['content'] "
    "+ '[/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
    "of lines": "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
}


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_has_the_ids_of_transformers(opening: Opening, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    source = published(opening, TEMPLATES[name])
    core = library.Tokenizer.from_str(source.data.decode())
    about = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": source.template}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **about)
    mine = TemplateRenderer(*adopt_published(source, len(pieces())))
    for talk in TALKS:
        messages = [{"role": message.role, "content": message.text} for message in talk.messages]
        for is_open in (True, False):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=is_open, return_dict=False)
            assert (mine.prompt(talk) if is_open else mine.render(talk).ids) == tuple(expected)
    for text in TEXTS:
        is_shortened = opening == "first" and text.startswith(" ")  # theirs leaves a space out
        if not is_shortened and "<s>" not in text:  # which theirs takes for the token
            assert mine.tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_what_is_learned_of_an_answer_is_what_follows_the_prompt_for_it() -> None:
    mine = TemplateRenderer(*adopt_published(published(), len(pieces())))
    talk = TALKS[1]
    rendered = mine.render(talk)
    prompt = mine.prompt(Conversation(talk.messages[:1]))
    assert rendered.ids[: len(prompt)] == prompt
    learned = [i for i, is_learned in zip(rendered.ids, rendered.loss_mask, strict=True) if is_learned]
    assert mine.tokenizer.pieces(learned) == [" in", " a", " nest", " ", "</s>"]


def test_an_answer_is_not_glued_to_a_space_that_already_asks_for_it() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}"
    )
    mine = TemplateRenderer(
        *adopt_published(published("always", template + "{{ 'assistant: ' }}{% endif %}"), len(pieces()))
    )
    prompt = mine.prompt(TALKS[0])
    assert mine.tokenizer.pieces(prompt)[-2:] == [":", " "]
    ids = mine.render(Conversation.of(("user", "a bird"), ("assistant", "in"))).ids
    assert ids[: len(prompt)] == prompt
    assert mine.tokenizer.pieces(ids[len(prompt) :]) == ["in", "</s>"]


# What is refused, and what is safe.


def harmed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    layout = json.loads(tokenizer()._data)
    change(layout)
    return json.dumps(layout).encode()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda all: all["model"].update(type="Unigram", vocab=[["a", 0.0]], merges=[]), "is a Unigram vocabulary"),
        (
            lambda all: all["model"].update(vocab=[["a", 0.0]], merges=[]),
            "its vocabulary gives no ids",
        ),
        (lambda all: all["model"].update(byte_fallback=False), "no tokens for single bytes"),
        (lambda all: all["model"]["vocab"].pop("<0xE4>"), "no tokens for single bytes"),
        (lambda all: all["model"].update(dropout=0.5), "sets dropout"),
        (lambda all: all["model"].update(ignore_merges=True), "sets ignore_merges"),
        (lambda all: all["model"].update(end_of_word_suffix="</w>"), "sets end_of_word_suffix"),
        (lambda all: all["normalizer"]["normalizers"].append({"type": "NFKC"}), "changes texts .* \\(NFKC\\)"),
        (lambda all: all["normalizer"]["normalizers"].append({"type": "Prepend", "prepend": "x"}), "changes texts"),
        (lambda all: all.update(pre_tokenizer={"type": "Whitespace"}), "changes texts"),
        (
            lambda all: all.update(
                pre_tokenizer={"type": "Split", "pattern": {"String": "x"}, "behavior": "Removed", "invert": False}
            ),
            "changes texts",
        ),
        (
            lambda all: all["model"]["merges"].append(["<0x0", "A>"]),
            "merges '<0x0' and 'A>', which its vocabulary lacks",
        ),
        (
            lambda all: (
                all["model"]["vocab"].update({"<0x0": 900, "A>": 901}),
                all["model"]["merges"].append(["<0x0", "A>"]),
            ),
            "puts tokens of bytes together",
        ),
    ],
)
def test_what_would_not_come_back_is_refused_by_name(change: Callable[[dict[str, Any]], Any], complaint: str) -> None:
    with pytest.raises(TokenizerError, match=complaint):
        Tokenizer(harmed(change))


NOTHING: dict[str, Any] = {"type": "Sequence", "normalizers": []}


@pytest.mark.parametrize(
    ("component", "opening"),
    [
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}, "always"),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}, "first"),
        ({"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}, "always"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Metaspace", "replacement": "▁"}]}, "always"),
        ({"type": "Metaspace", "replacement": "▁", "add_prefix_space": False, "prepend_scheme": "never"}, "never"),
    ],
)
def test_the_spellings_of_older_and_newer_files_are_all_read(component: dict[str, Any], opening: Opening) -> None:
    found = Tokenizer(harmed(lambda all: all.update(normalizer=NOTHING, pre_tokenizer=component)))
    assert found.opening == opening
    assert found.decode(found.encode("a bird  in")) == "a bird  in"
    assert found.pieces(found.encode("a bird in")) == TOKENIZERS[opening].pieces(
        TOKENIZERS[opening].encode("a bird in")
    )


def test_text_that_the_vocabulary_itself_would_spell_as_a_special_token_becomes_none() -> None:
    more = (Piece("</", -50.0), Piece("s>", -51.0), Piece("<", -200.0), Piece(">", -201.0))
    layout = layout_of(pieces(*more), "always")
    layout["model"]["merges"].append(["</", "s>"])
    source = published(of=more)
    tampered = json.dumps(layout).encode()
    assert library.Tokenizer.from_str(tampered.decode()).encode("</s>").ids == [2]
    found, _ = adopt_published(type(source)(tampered, "<s>", ("</s>",), None, True), len(pieces(*more)))
    for text in ("</s>", "a</s> b", "</s></s>"):
        assert found.special_ids.isdisjoint(found.encode(text))
        assert found.decode(found.encode(text)) == text


def test_padding_has_an_id_that_no_text_becomes_and_an_export_gives_it_back() -> None:
    source = published()
    found, template = adopt_published(source, len(pieces()))
    assert (found.token_bytes(found.pad_id), template.names["<0xFF>"]) == (b"", "<|pad|>")
    assert json.loads(publish_imported(found._data, template).data) == json.loads(source.data)


def test_the_unknown_token_may_be_the_padding() -> None:
    """As in many files; no text becomes it, since there are bytes for what no piece holds."""
    source = replace(published(), pad="<unk>")
    found, template = adopt_published(source, len(pieces()))
    assert (found.pad_id, found.decode(found.encode("é🐦"))) == (0, "é🐦")
    given_back = publish_imported(found._data, template)
    assert (given_back.pad, json.loads(given_back.data)) == ("<unk>", json.loads(source.data))


def test_scores_come_back_in_their_order() -> None:
    layout = parse(published().data)
    scores, is_exact = scores_of(layout)
    joined = [piece.text for piece in pieces() if piece.kind == Kind.NORMAL and len(piece.text) > 1]
    assert sorted(joined, key=lambda piece: -scores[piece]) == joined
    assert is_exact
    layout["model"]["merges"].pop()
    assert not scores_of(layout)[1]


def test_of_merges_of_one_score_the_longest_left_part_is_joined_first() -> None:
    given_pieces = [Piece("aa", 0.0), Piece("aaa", 0.0), Piece("a", 0.0)]
    assert merges_of(given_pieces) == [("aa", "a"), ("a", "aa"), ("a", "a")]


def test_a_vocabulary_that_would_take_forever_is_refused() -> None:
    with pytest.raises(TokenizerError, match="has pieces of up to 5,000 and together 5,000 characters"):
        layout_of([Piece("a" * 5_000, 0.0)], "always")
