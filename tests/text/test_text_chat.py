from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import KINDS, trained

from fledge.errors import TokenizerError
from fledge.text.chat import ROLES, ChatRenderer, ChatTemplate, conversation_piece, normalise
from fledge.text.tokenizer import SPECIAL_TOKENS
from fledge.types import Conversation, Message, Role, Termination, TextPart

PIECES = [
    "<|end|>",
    "<|assistant|>",
    "<|pad|>",
    "\r\n",
    "\r",
    " ",
    "\n",
    "",
    "你好，世界",
    "Hello",
    "\x00",
    "🙂",
    "def f():\n    ",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=5)
parts = texts.map(lambda pieces: tuple(TextPart(piece) for piece in pieces))
messages = st.builds(Message, st.sampled_from(ROLES), parts)
conversations = st.lists(messages, max_size=6).map(lambda items: Conversation(tuple(items)))

CHINESE = Conversation.of(
    ("system", "你是一个乐于助人的助手。"),
    ("user", "北京的天气怎么样？"),
    ("assistant", "今天晴天，二十五度。"),
    ("user", "谢谢！"),
    ("assistant", "不客气。"),
)


@pytest.fixture(scope="module", params=KINDS)
def renderer(request: pytest.FixtureRequest) -> ChatRenderer:
    return ChatRenderer(trained(request.param))


RENDERER = ChatRenderer(trained())


@given(conversations)
def test_texts_encoded_beforehand_render_the_same(conversation: Conversation) -> None:
    knowing = RENDERER.knowing(message.text for message in conversation.messages)
    assert knowing.render(conversation) == RENDERER.render(conversation)
    assert RENDERER.knowing(["hello"]).render(conversation) == RENDERER.render(conversation)


def test_c09_the_loss_covers_assistant_tokens_and_their_end_only(renderer: ChatRenderer) -> None:
    tokenizer = renderer.tokenizer
    conversation = Conversation.of(("system", "s"), ("user", "Hi"), ("assistant", "你好"))
    s, hi, hello = (tokenizer.encode(text) for text in ("s", "Hi", "你好"))
    start, system, user, assistant, end = (
        tokenizer.special_id(f"<|{name}|>") for name in ("endoftext", "system", "user", "assistant", "end")
    )
    rendered = renderer.render(conversation)
    assert rendered.ids == (start, system, *s, end, user, *hi, end, assistant, *hello, end)
    unlearned = 1 + (2 + len(s)) + (2 + len(hi)) + 1
    assert rendered.loss_mask == (False,) * unlearned + (True,) * (len(hello) + 1)


def test_c09_three_turns_with_a_tool_are_learned_where_the_assistant_speaks_and_nowhere_else() -> None:
    encode, end = RENDERER.tokenizer.encode, RENDERER.tokenizer.special_id("<|end|>")
    turns = (
        ("user", "1+1?"),
        ("assistant", "2"),
        ("user", "Hi"),
        ("assistant", "x"),
        ("tool", "4"),
        ("assistant", "好"),
    )
    rendered = RENDERER.render(Conversation.of(("system", "s"), *turns))
    learned = [token for token, is_learned in zip(rendered.ids, rendered.loss_mask, strict=True) if is_learned]
    assert learned == [*encode("2"), end, *encode("x"), end, *encode("好"), end]
    for said in ("1+1?", "Hi", "4", "s"):
        ids = encode(said)
        places = [n for n in range(len(rendered.ids)) if list(rendered.ids[n : n + len(ids)]) == list(ids)]
        assert places
        assert not any(any(rendered.loss_mask[n : n + len(ids)]) for n in places)


@settings(max_examples=150, deadline=None)
@given(conversation=conversations)
def test_parsing_gives_back_the_last_normalised_message(conversation: Conversation) -> None:
    normal = normalise(conversation)
    if normal.messages:
        assert RENDERER.parse(RENDERER.render(normal).ids) == (normal.messages[-1], Termination.END_OF_TURN)
        unended = RENDERER.render(normal, ended=False)
        assert len(unended.ids) == len(unended.loss_mask) == len(RENDERER.render(normal).ids) - 1
        last, termination = RENDERER.parse(unended.ids)
        assert (last, termination) == (normal.messages[-1], Termination.TRUNCATED)


@settings(max_examples=100, deadline=None)
@given(conversation=conversations, answer=parts)
def test_the_prompt_is_a_prefix_of_what_is_rendered(conversation: Conversation, answer: tuple[TextPart, ...]) -> None:
    whole = Conversation((*conversation.messages, Message("assistant", answer)))
    prompt = RENDERER.prompt(conversation)
    assert RENDERER.render(whole).ids[: len(prompt)] == prompt
    assert RENDERER.prompt(whole)[: len(prompt)] == prompt


@settings(max_examples=100, deadline=None)
@given(conversation=conversations)
def test_text_never_becomes_a_special_token(conversation: Conversation) -> None:
    ids = RENDERER.render(conversation).ids
    special = [i for i in ids if i in RENDERER.tokenizer.special_ids]
    expected = [RENDERER.start_id]
    for message in conversation.messages:
        expected += [RENDERER.role_ids[message.role], RENDERER.end_id]
    assert special == expected


@settings(max_examples=100, deadline=None)
@given(conversation=conversations)
def test_normalising_twice_changes_nothing_more(conversation: Conversation) -> None:
    once = normalise(conversation)
    assert normalise(once) == once
    assert all(message.text == message.text.strip() != "" for message in once.messages)
    for before, after in zip(once.messages, once.messages[1:], strict=False):
        assert before.role != after.role or before.role == "tool"


def test_normalising_joins_neighbours_and_drops_what_is_empty() -> None:
    given_ = Conversation.of(
        ("user", " one\r\n"),
        ("assistant", "  "),
        ("user", "two\rthree"),
        ("tool", "4"),
        ("tool", "5"),
        ("assistant", " 好 "),
    )
    assert normalise(given_) == Conversation.of(
        ("user", "one\ntwo\nthree"), ("tool", "4"), ("tool", "5"), ("assistant", "好")
    )


def test_chinese_conversations_come_back(renderer: ChatRenderer) -> None:
    for end in range(1, len(CHINESE.messages) + 1):
        shown = Conversation(CHINESE.messages[:end])
        assert renderer.parse(renderer.render(shown).ids) == (shown.messages[-1], Termination.END_OF_TURN)


def test_what_was_generated_is_parsed_with_or_without_its_prompt() -> None:
    answer, end = RENDERER.tokenizer.encode("晴天 today"), RENDERER.end_id
    prompt = RENDERER.prompt(Conversation(CHINESE.messages[:2]))
    message = Message.of("assistant", "晴天 today")
    for before in ((), prompt):
        assert RENDERER.parse((*before, *answer, end)) == (message, Termination.END_OF_TURN)
        assert RENDERER.parse((*before, *answer)) == (message, Termination.TRUNCATED)
        assert RENDERER.parse((*before, *answer, end, RENDERER.tokenizer.pad_id)) == (message, Termination.END_OF_TURN)
        assert RENDERER.parse((*before, *answer, RENDERER.tokenizer.pad_id)) == (message, Termination.TRUNCATED)
    assert RENDERER.parse(()) == (Message.of("assistant", ""), Termination.TRUNCATED)
    assert RENDERER.parse((end,)) == (Message.of("assistant", ""), Termination.END_OF_TURN)


def test_c23_only_the_end_of_turn_token_ends_an_answer() -> None:
    prompt = RENDERER.prompt(Conversation(CHINESE.messages[:2]))
    answer = RENDERER.tokenizer.encode("ok")
    slips = [RENDERER.tokenizer.end_of_text_id, *RENDERER.role_ids.values()]
    for slip in slips:  # a model opens a turn without ending its own: its answer stops there, cut off
        for after in ((), (*RENDERER.tokenizer.encode("more"), RENDERER.end_id)):
            assert RENDERER.parse((*prompt, *answer, slip, *after)) == (
                Message.of("assistant", "ok"),
                Termination.TRUNCATED,
            )
    assert RENDERER.stop_ids == {RENDERER.end_id, RENDERER.tokenizer.end_of_text_id}


def test_c11_the_hash_names_the_template() -> None:
    assert RENDERER.hash == ChatRenderer(trained("unigram")).hash
    changed = replace(ChatTemplate(), tool="<|reserved_0|>")
    assert ChatRenderer(trained(), changed).hash != RENDERER.hash
    # Checkpoints on disk carry this value: a changed template must be a decision, not an accident.
    assert RENDERER.hash == "58b36ed82dc3585e9b58c6c32280130a1fa8b925c46d840dd79cf9c38bf46dbc"


@pytest.mark.parametrize("token", ["<|pad|>", "<|endoftext|>", "<|user|>"])
def test_c01_a_template_that_gives_one_token_two_meanings_is_refused(token: str) -> None:
    with pytest.raises(TokenizerError, match="distinct"):
        ChatRenderer(trained(), replace(ChatTemplate(), end=token))
    with pytest.raises(TokenizerError, match="no special token"):
        ChatRenderer(trained(), replace(ChatTemplate(), end="<|finish|>"))


def turns(*texts: tuple[Role, str]) -> tuple[int, ...]:
    return RENDERER.render(Conversation.of(*texts)).ids


def test_a_conversation_that_fits_becomes_one_piece_with_its_mask() -> None:
    rendered = RENDERER.render(CHINESE)
    for longest in (len(rendered.ids), 10_000):
        piece = conversation_piece(RENDERER, CHINESE, longest)
        assert piece is not None
        assert piece.ids.dtype == np.int32
        assert piece.loss_mask.dtype == np.float32
        assert tuple(piece.ids) == rendered.ids
        assert tuple(piece.loss_mask > 0) == rendered.loss_mask


def test_what_comes_after_the_last_answer_is_left_away() -> None:
    piece = conversation_piece(RENDERER, CHINESE.then("user", "还有呢？"), 10_000)
    assert piece is not None
    assert tuple(piece.ids) == RENDERER.render(CHINESE).ids


def test_an_over_long_conversation_loses_its_oldest_exchange_and_keeps_the_system_message() -> None:
    whole = len(RENDERER.render(CHINESE).ids)
    shorter = Conversation((CHINESE.messages[0], *CHINESE.messages[3:]))
    for longest in (whole - 1, len(RENDERER.render(shorter).ids)):
        piece = conversation_piece(RENDERER, CHINESE, longest)
        assert piece is not None
        assert tuple(piece.ids) == RENDERER.render(shorter).ids


def test_no_more_exchanges_are_dropped_than_must_be() -> None:
    exchanges = [(("user", f"question {n}"), ("assistant", f"answer {n}")) for n in range(4)]
    for first in range(4):
        kept = turns(*(turn for exchange in exchanges[first:] for turn in exchange))
        everything = Conversation.of(*(turn for exchange in exchanges for turn in exchange))
        piece = conversation_piece(RENDERER, everything, len(kept))
        assert piece is not None
        assert tuple(piece.ids) == kept


def test_a_single_exchange_that_is_too_long_is_cut_at_its_tail() -> None:
    conversation = Conversation.of(("user", "Hi"), ("assistant", "one two three four five six seven"))
    ids = RENDERER.render(conversation).ids
    prompt = len(RENDERER.prompt(Conversation.of(("user", "Hi"))))
    piece = conversation_piece(RENDERER, conversation, prompt + 1)
    assert piece is not None
    assert tuple(piece.ids) == ids[: prompt + 1]
    assert piece.loss_mask.tolist() == [0.0] * prompt + [1.0]
    assert conversation_piece(RENDERER, conversation, prompt) is None


@settings(max_examples=150, deadline=None)
@given(conversation=conversations, longest=st.integers(0, 60))
def test_no_piece_is_too_long_or_has_nothing_to_learn(conversation: Conversation, longest: int) -> None:
    piece = conversation_piece(RENDERER, normalise(conversation), longest)
    if piece is None:
        return
    assert len(piece.ids) == len(piece.loss_mask) <= longest
    assert piece.loss_mask[1:].sum() > 0
    assert piece.ids[0] == RENDERER.start_id
    learned = piece.ids[piece.loss_mask > 0].tolist()
    assert (RENDERER.tokenizer.special_ids - {RENDERER.end_id}).isdisjoint(learned)


@pytest.mark.parametrize(
    "conversation",
    [Conversation(()), Conversation.of(("system", "s")), Conversation.of(("user", "Hi"), ("tool", "7"))],
)
def test_a_conversation_without_an_answer_gives_no_piece(conversation: Conversation) -> None:
    assert conversation_piece(RENDERER, conversation, 100) is None


def test_every_special_token_can_be_said_by_a_user() -> None:
    ids = turns(("user", " ".join(SPECIAL_TOKENS)), ("assistant", "ok"))
    first, _ = RENDERER.parse(ids[: ids.index(RENDERER.end_id) + 1])
    assert first == Message.of("user", " ".join(SPECIAL_TOKENS))


def test_c09_an_answer_that_is_context_only_is_shown_but_not_learned() -> None:
    answer = Message.of("assistant", "old")
    talk = Conversation(
        (Message.of("user", "a"), replace(answer, is_learned=False), *Conversation.of(("user", "b")).messages)
    )
    rendered = RENDERER.render(talk.then("assistant", "new"))
    learned = [token for token, mask in zip(rendered.ids, rendered.loss_mask, strict=True) if mask]
    assert learned == [*RENDERER.tokenizer.encode("new"), RENDERER.end_id]
    assert (
        rendered.ids
        == RENDERER.render(
            replace(talk, messages=(talk.messages[0], answer, talk.messages[2])).then("assistant", "new")
        ).ids
    )


def test_normalise_keeps_what_is_learned_apart_from_what_is_not_and_keeps_the_tools() -> None:
    old, new = replace(Message.of("assistant", " old "), is_learned=False), Message.of("assistant", "new")
    talk = Conversation((Message.of("user", "a"), old, new, new), ('{"name": "f"}',))
    kept = normalise(talk)
    assert [(m.text, m.is_learned) for m in kept.messages] == [("a", True), ("old", False), ("new\nnew", True)]
    assert kept.tools == talk.tools
