"""Examples of every type for the tests of the alignment formats: fixed ones and hypothesis strategies."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from fledge.types import (
    CallPart,
    ChatExample,
    Conversation,
    Judgement,
    Message,
    PairExample,
    PromptExample,
    Provenance,
    Ranking,
    RatedExample,
    StepsExample,
    TextExample,
    TextPart,
    UnpairedExample,
)

ORIGIN = Provenance("here", "7", "MIT")
QUESTION = Conversation.of(("user", "Why is the sky blue? 天为什么蓝？"))
TOOL = json.dumps({"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}})

letters = st.characters(codec="utf-8", exclude_characters="\x00")
texts = st.text(letters, min_size=1, max_size=30).filter(lambda text: bool(text.strip()))
words = st.text(st.sampled_from("abcdefg 天地玄黄\n,.!?"), min_size=1, max_size=20).map(str.strip).filter(bool)
names = st.sampled_from(["ann", "bo", "模型-1", "v2"])
finite = st.floats(-100, 100, allow_nan=False)
shares = st.floats(0, 1, allow_nan=False)
judgements = st.one_of(
    st.none(),
    st.builds(
        Judgement,
        st.sampled_from(["human", "ai", "rule"]),
        st.none() | names,
        st.none() | finite,
        st.none() | names,
        st.none() | names,
        st.none() | words,
        st.none() | words,
    ),
)


@st.composite
def calls(draw: st.DrawFn, with_id: bool = True) -> CallPart:
    arguments: dict[str, Any] = draw(st.dictionaries(names, st.integers() | words, max_size=2))
    identity = draw(st.none() | names) if with_id else None
    return CallPart(draw(names), json.dumps(arguments, ensure_ascii=False), identity)


@st.composite
def prompts(draw: st.DrawFn, text: st.SearchStrategy[str] = texts, system: bool = True) -> Conversation:
    """System or not, then user and assistant in turns, the user last."""
    messages = [Message.of("system", draw(text))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        messages += [Message.of("user", draw(text)), Message.of("assistant", draw(text))]
    return Conversation((*messages, Message.of("user", draw(text))))


@st.composite
def chats(draw: st.DrawFn, text: st.SearchStrategy[str] = texts, system: bool = True) -> ChatExample:
    return ChatExample(draw(prompts(text, system)).then("assistant", draw(text)), ORIGIN)


@st.composite
def tool_chats(draw: st.DrawFn, with_id: bool = True) -> ChatExample:
    """A conversation in which the assistant calls functions and is answered."""
    called = tuple(draw(st.lists(calls(with_id), min_size=1, max_size=2)))
    name, call_id = (draw(names), draw(names)) if with_id else (None, None)
    answer = Message("tool", (TextPart(draw(words)),), name=name, call_id=call_id)
    messages = (
        *draw(prompts()).messages,
        Message("assistant", called),
        answer,
        Message.of("assistant", draw(texts)),
    )
    return ChatExample(Conversation(messages, (TOOL,)), ORIGIN)


@st.composite
def half_learned(draw: st.DrawFn) -> ChatExample:
    """A conversation of which only the last answer is learned."""
    prompt = draw(prompts())
    context = tuple(Message(m.role, m.parts, is_learned=False) for m in prompt.messages)
    return ChatExample(Conversation((*context, Message.of("assistant", draw(texts)))), ORIGIN)


@st.composite
def plain_pairs(draw: st.DrawFn, text: st.SearchStrategy[str] = texts, system: bool = True) -> PairExample:
    chosen = draw(text)
    rejected = draw(text.filter(lambda other: other != chosen))
    return PairExample(draw(prompts(text, system)), chosen, rejected, ORIGIN)


@st.composite
def pairs(draw: st.DrawFn) -> PairExample:
    plain = draw(plain_pairs())
    return PairExample(
        plain.prompt,
        plain.chosen,
        plain.rejected,
        ORIGIN,
        draw(shares),
        draw(st.none() | finite),
        draw(st.none() | st.tuples(finite, finite)),
        draw(judgements),
        draw(st.sampled_from([None, "chosen", "rejected"])),
    )


@st.composite
def rankings(draw: st.DrawFn, text: st.SearchStrategy[str] = texts, system: bool = True) -> Ranking:
    ranks = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=6).filter(lambda r: len(set(r)) > 1)))
    count = len(ranks)

    def several(one: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.lists(one, min_size=count, max_size=count)))

    logprobs = several(st.lists(st.floats(-20, 0), max_size=3).map(tuple)) if draw(st.booleans()) else None
    shown = tuple(draw(st.permutations(range(1, count + 1)))) if draw(st.booleans()) else None
    return Ranking(
        draw(prompts(text, system)),
        several(text),
        ranks,
        several(st.booleans()),
        several(names),
        ORIGIN,
        draw(judgements),
        logprobs,
        shown,
    )


@st.composite
def duels(draw: st.DrawFn, prompt: st.SearchStrategy[Conversation], judgement: Judgement) -> Ranking:
    """A ranking of two, shown in order."""
    first = draw(words)
    second = draw(words.filter(lambda other: other != first))
    ranks = draw(st.sampled_from([(1, 2), (2, 1)]))
    models = draw(names), draw(names)
    return Ranking(draw(prompt), (first, second), ranks, (True, True), models, ORIGIN, judgement, shown=(1, 2))


verdicts = st.builds(UnpairedExample, prompts(), texts, st.booleans(), st.just(ORIGIN), shares, judgements)
ratings = st.builds(
    RatedExample,
    prompts(),
    texts,
    finite,
    st.just(ORIGIN),
    st.lists(words, max_size=2).map(tuple),
    st.none() | names,
    judgements,
)
plain_verdicts = st.builds(UnpairedExample, prompts(), texts, st.booleans(), st.just(ORIGIN))
documents = st.builds(TextExample, texts, st.just(ORIGIN))
questions = st.builds(PromptExample, prompts(), st.just(ORIGIN))


@st.composite
def in_steps(draw: st.DrawFn) -> StepsExample:
    steps = draw(st.lists(st.tuples(texts, st.booleans()), min_size=1, max_size=4))
    return StepsExample(draw(prompts()), tuple(s for s, _ in steps), tuple(r for _, r in steps), ORIGIN)


@st.composite
def verified(draw: st.DrawFn) -> PromptExample:
    extra = {"style": draw(st.sampled_from(["rule", "model"])), "ability": "math", "index": draw(st.integers(0, 99))}
    return PromptExample(draw(prompts()), ORIGIN, draw(texts), draw(names), extra)


@st.composite
def posts(draw: st.DrawFn) -> Conversation:
    line = st.text(st.sampled_from("abc 天地."), max_size=9)
    told = draw(line), draw(line), draw(words)
    return Conversation.of(("user", "SUBREDDIT: r/{}\n\nTITLE: {}\n\nPOST: {}\n\nTL;DR:".format(*told)))


POST_JUDGE = Judgement("human", "w1", 3.0, "b2")
VOTE = Judgement("human", "u1", None, "names hidden")


@st.composite
def tied_battles(draw: st.DrawFn) -> PairExample:
    rationale = draw(st.sampled_from([None, "both bad"]))
    judgement = Judgement("human", "u1", None, "names shown", "m1 | m2", rationale=rationale)
    return PairExample(draw(prompts()), draw(texts), draw(texts), ORIGIN, 0.5, judgement=judgement)


post_ratings = st.builds(
    RatedExample,
    posts(),
    words,
    st.integers(1, 7).map(float),
    st.just(ORIGIN),
    st.just(()),
    names,
    st.just(POST_JUDGE),
)
single_turns = st.builds(
    lambda said, answered: ChatExample(Conversation.of(("user", said), ("assistant", answered)), ORIGIN), texts, texts
)


@st.composite
def tree_rankings(draw: st.DrawFn) -> Ranking:
    """What an OpenAssistant tree can say: no system message, ranks, who wrote it, and that humans ranked."""
    r = draw(rankings(texts, False))
    makers = tuple(draw(st.sampled_from(["human", "m1"])) for _ in r.ranks)
    return Ranking(r.prompt, r.completions, r.ranks, (True,) * len(r.ranks), makers, ORIGIN, Judgement("human"))


def sorted_by_rank(example: Ranking) -> Ranking:
    """Replies of a tree come back best first."""
    order = sorted(range(len(example.ranks)), key=lambda k: example.ranks[k])
    pick = lambda values: tuple(values[k] for k in order)  # noqa: E731
    completions, ranks, makers = pick(example.completions), pick(example.ranks), pick(example.makers)
    return Ranking(example.prompt, completions, ranks, example.ended, makers, ORIGIN, example.judgement)


# By format: what it must be able to hold.
HOLDS: dict[str, st.SearchStrategy[Any]] = {
    "trl": st.one_of(documents, chats(), tool_chats(), half_learned(), pairs(), verdicts, questions, in_steps()),
    "labels": st.one_of(rankings(), pairs(), verdicts, ratings),
    "alpaca": st.one_of(chats(), plain_pairs(), plain_verdicts),
    "sharegpt": st.one_of(chats(), tool_chats(with_id=False), plain_pairs(), plain_verdicts),
    "openai": st.one_of(chats(), tool_chats(), plain_pairs()),
    "verl": verified(),
    "hh-rlhf": plain_pairs(words, False),
    "ds-chat": plain_pairs(words, False),
    "self-instruct": single_turns,
    "summaries": st.one_of(duels(posts(), POST_JUDGE), post_ratings),
    "arena": st.one_of(duels(prompts(), VOTE), tied_battles()),
    "oasst": st.one_of(chats(texts, False), tree_rankings().map(sorted_by_rank)),
}
