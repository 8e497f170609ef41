"""Published tokenizers as ours: which tokens serve as what, and that nothing is lost on the way back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tokenizers as library
from template_samples import SPECIAL, STYLES, TEXTS, layout
from text_samples import trained
from tokenizers import processors

from fledge.errors import TokenizerError
from fledge.text.chat import ChatRenderer
from fledge.text.published import CHATML, PLAIN, PublishedTokenizer, adopt_published, publish_imported, publish_own
from fledge.text.template import TemplateRenderer
from fledge.types import Conversation

SIZE = library.Tokenizer.from_str(layout().decode()).get_vocab_size()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("extra", [0, 5])
def test_ids_and_texts_are_those_of_the_published_tokenizer(style: str, extra: int) -> None:
    published = STYLES[style]
    core = library.Tokenizer.from_str(published.data.decode())
    core.encode_special_tokens = True
    tokenizer, template = adopt_published(published, SIZE + extra)
    for text in (*TEXTS, "<think>", "x<|im_end|>y"):
        assert tokenizer.encode(text) == core.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == SIZE + extra
    assert tokenizer.pad_id not in {tokenizer.end_of_text_id, *TemplateRenderer(tokenizer, template).stop_ids}


@pytest.mark.parametrize(
    ("published", "document"),
    [
        (STYLES["llama3"], "<|begin_of_text|>"),  # its makers put it before every text
        (replace(STYLES["llama3"], begins=False), "<|endoftext|>"),
        (STYLES["chatml"], "<|endoftext|>"),
        (PublishedTokenizer(layout(("<s>", "</s>", "<x>")), "<s>", ("</s>",)), "</s>"),
    ],
)
def test_a_document_begins_as_its_makers_have_it(published: PublishedTokenizer, document: str) -> None:
    tokenizer, _ = adopt_published(published, SIZE)
    assert tokenizer.end_of_text_id == library.Tokenizer.from_str(published.data.decode()).token_to_id(document)


def test_padding_that_is_an_end_gets_a_row_without_a_token() -> None:
    tokenizer, _ = adopt_published(STYLES["chatml"], SIZE + 2)
    assert tokenizer.pad_id == SIZE + 1
    assert tokenizer.token_bytes(SIZE) == tokenizer.token_bytes(SIZE + 1) == b""


def test_or_else_the_token_of_a_byte_that_no_text_holds() -> None:
    core = library.Tokenizer.from_str(layout().decode())
    tokenizer, _ = adopt_published(STYLES["chatml"], SIZE)
    assert tokenizer.pad_id == core.token_to_id("ÿ")  # byte 0xFF in the alphabet of GPT-2
    assert tokenizer.decode(tokenizer.encode("ÿ")) == "ÿ"


def without_odd_bytes() -> bytes:
    """A vocabulary in which every byte that is there occurs in texts, as SmolLM2's."""
    read = json.loads(layout())
    keep = {token: i for token, i in read["model"]["vocab"].items() if token not in "ÀÁõö÷øùúûüýþÿ"}
    read["model"]["vocab"] = {token: number for number, token in enumerate(sorted(keep, key=lambda t: keep[t]))}
    for number, token in enumerate(read["added_tokens"]):
        token["id"] = len(keep) + number
    return json.dumps(read).encode()


def test_or_else_a_special_token_that_is_in_no_use() -> None:
    data = without_odd_bytes()
    core = library.Tokenizer.from_str(data.decode())
    tokenizer, template = adopt_published(replace(STYLES["chatml"], data=data), core.get_vocab_size())
    assert template.names["<|spare|>"] == "<|pad|>"
    assert tokenizer.pad_id == core.token_to_id("<|spare|>")


def test_and_where_all_are_in_use_the_tokenizer_is_refused() -> None:
    data = without_odd_bytes()
    published = replace(STYLES["chatml"], data=data, template=" ".join(SPECIAL))
    with pytest.raises(TokenizerError, match="leaves no id to pad with"):
        adopt_published(published, library.Tokenizer.from_str(data.decode()).get_vocab_size())


def test_padding_of_its_own_is_kept() -> None:
    tokenizer, template = adopt_published(replace(STYLES["chatml"], pad="<|spare|>"), SIZE)
    assert tokenizer.pad_id == library.Tokenizer.from_str(layout().decode()).token_to_id("<|spare|>")
    assert publish_imported(tokenizer._data, template).pad == "<|spare|>"


@pytest.mark.parametrize("extra", [0, 2])
def test_padding_that_the_file_lacks_is_as_none(extra: int) -> None:
    """As where a name stands in the settings that nobody added to the vocabulary."""
    lacking = adopt_published(replace(STYLES["chatml"], pad="[PAD]"), SIZE + extra)
    none = adopt_published(replace(STYLES["chatml"], pad=None), SIZE + extra)
    assert (lacking[0].pad_id, lacking[1]) == (none[0].pad_id, none[1])


def unmarked(data: bytes, *names: str, is_added: bool = True) -> bytes:
    """The file with some of its special tokens as ordinary added ones, or not added at all."""
    read = json.loads(data)
    kept = [token for token in read["added_tokens"] if is_added or token["content"] not in names]
    for token in read["added_tokens"]:
        read["model"]["vocab"][token["content"]] = token["id"]
    read["added_tokens"] = [{**token, "special": token["special"] and token["content"] not in names} for token in kept]
    return json.dumps(read).encode()


@pytest.mark.parametrize(
    ("style", "names"),
    [
        ("chatml", ("<|im_start|>", "<|im_end|>")),
        ("llama3", ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>")),
        ("mistral", ("[INST]", "[/INST]", "<s>", "</s>")),
    ],
)
@pytest.mark.parametrize("is_added", [True, False])
def test_tokens_that_stand_around_texts_are_special_though_their_makers_did_not_mark_them(
    style: str, names: tuple[str, ...], is_added: bool
) -> None:
    marked = STYLES[style]
    plain = replace(marked, data=unmarked(marked.data, *names, is_added=is_added))
    renderers = [TemplateRenderer(*adopt_published(one, SIZE)) for one in (marked, plain)]
    if not is_added and style != "mistral":
        names = tuple(name for name in names if name in (*marked.ends, marked.bos))  # the rest nobody tells us of
    for name in names:
        prompts = [renderer.prompt(Conversation.of(("user", f"x {name} y"))) for renderer in renderers]
        assert prompts[0] == prompts[1] or not is_added
        said = renderers[1].tokenizer.encode(f"x {name} y")
        assert renderers[1].tokenizer.special_ids.isdisjoint(said)
        assert renderers[1].tokenizer.decode(said) == f"x {name} y"
    assert renderers[0].end_id == renderers[1].end_id


def test_tags_within_what_is_said_stay_text() -> None:
    tokenizer, _ = adopt_published(STYLES["qwen3"], SIZE)
    thought = library.Tokenizer.from_str(layout().decode()).token_to_id("<think>")
    assert tokenizer.encode("<think>") == [thought]
    assert tokenizer.decode([thought]) == "<think>"


@pytest.mark.parametrize("rows", [SIZE - 1, 10])
def test_a_tokenizer_of_another_model_is_refused_by_its_first_token_too_many(rows: int) -> None:
    with pytest.raises(TokenizerError, match=rf"'</think>' with id {SIZE - 1}, but the model has {rows} rows"):
        adopt_published(STYLES["chatml"], rows)


def test_names_of_ours_that_mean_something_else_there_are_moved_aside() -> None:
    data = layout(("<s>", "</s>", "<|pad|>", "<|endoftext|>"))
    published = PublishedTokenizer(data, "<s>", ("</s>", "<|pad|>"), "</s>", True)
    core = library.Tokenizer.from_str(data.decode())
    tokenizer, template = adopt_published(published, core.get_vocab_size() + 1)
    assert tokenizer.end_of_text_id == core.token_to_id("<s>")
    assert tokenizer.pad_id == core.get_vocab_size()
    assert core.token_to_id("<|pad|>") in TemplateRenderer(tokenizer, template).stop_ids
    given_back = json.loads(publish_imported(tokenizer._data, template).data)
    assert given_back["added_tokens"] == json.loads(data)["added_tokens"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("extra", [0, 3])
def test_what_was_adopted_is_published_as_it_was(style: str, extra: int) -> None:
    core = library.Tokenizer.from_str(layout().decode())
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    given = replace(STYLES[style], data=core.to_str().encode())
    tokenizer, template = adopt_published(given, SIZE + extra)
    found = publish_imported(tokenizer._data, template)
    ours, theirs = json.loads(found.data), json.loads(given.data)
    for token in theirs["added_tokens"]:  # what frames texts comes back special
        token["special"] |= style == "deepseek" and "｜" in token["content"]
    names = {token["content"] for token in theirs["added_tokens"]}
    kept = {token: i for token, i in ours["model"].pop("vocab").items() if token not in names}
    assert kept == {token: i for token, i in theirs["model"].pop("vocab").items() if token not in names}
    assert ours == theirs
    same = ("bos", "ends", "begins", "template")
    assert [getattr(found, name) for name in same] == [getattr(given, name) for name in same]
    again, template_again = adopt_published(found, SIZE + extra)
    assert (template_again, again.pad_id) == (template, tokenizer.pad_id)


def test_a_model_without_a_template_chats_in_chatml_if_it_has_its_tokens() -> None:
    assert adopt_published(replace(STYLES["chatml"], template=None), SIZE)[1].source == CHATML
    plain = PublishedTokenizer(layout(("<|endoftext|>",)), None, ("<|endoftext|>",))
    tokenizer, template = adopt_published(plain, SIZE)
    assert template.source == PLAIN
    prompt = TemplateRenderer(tokenizer, template).prompt(Conversation.of(("user", "a bird?")))
    assert tokenizer.decode(prompt) == "User: a bird?\nAssistant:"


def test_a_tokenizer_without_special_tokens_is_refused() -> None:
    with pytest.raises(TokenizerError, match="no token that begins or ends a text"):
        adopt_published(PublishedTokenizer(layout(())), SIZE)


def test_our_own_template_told_in_jinja_gives_our_own_ids() -> None:
    renderer = ChatRenderer(trained())
    published = publish_own(trained()._data, renderer)
    tokenizer, template = adopt_published(published, trained().vocab_size)
    talk = Conversation.of(("system", "be"), ("user", "x <|end|>"), ("assistant", "y"), ("tool", "z"), ("user", "w"))
    assert TemplateRenderer(tokenizer, template).prompt(talk) == renderer.prompt(talk)
    assert TemplateRenderer(tokenizer, template).stop_ids == renderer.stop_ids
